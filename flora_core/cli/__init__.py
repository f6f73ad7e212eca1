"""The flora command."""
