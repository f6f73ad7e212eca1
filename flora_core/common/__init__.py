"""The ground floor: checks, seeds, segments, files, errors, formatting. Needs no other package of the engine."""
