"""Presets and what a command line makes of them: the resolved configuration of a run."""
