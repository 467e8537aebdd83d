"""Files that are made once and reused: directions, bases and vectors, each with its provenance."""
