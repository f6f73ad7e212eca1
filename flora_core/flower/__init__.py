"""Runs between machines, on Flower's network."""
