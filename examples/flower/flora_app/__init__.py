"""flora-core as a Flower app."""
