"""The processes that torchrun starts: meeting, moving states, a base in shards."""
