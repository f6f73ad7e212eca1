"""One resident causal language model with the adapters of many clients."""
