"""Bundled presets: YAML files that override the code's defaults."""
