"""A cohort's training: steps of all clients in one batch, their optimizer, memory, and pauses."""
