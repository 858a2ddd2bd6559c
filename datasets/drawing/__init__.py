"""Drawings: the bundled data is made by these."""
