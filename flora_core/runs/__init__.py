"""One run: what it is made of, its folder, events, progress and report."""
