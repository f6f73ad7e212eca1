"""Adapters: the bank of all clients' factors, what a client sends, PEFT folders, and the base that an adapter fits."""
