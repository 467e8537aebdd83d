"""Artifacts: made once from models or rows, saved with provenance, refused where they do not fit."""
