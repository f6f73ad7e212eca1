"""Differentiable ops over the clients of a packed batch, for models and frameworks of one's own."""
