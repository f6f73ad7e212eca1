"""Rounds of federated training: clients, the judge of their updates, the server, privacy, resuming."""
