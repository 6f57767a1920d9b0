"""Presets: each YAML file holds only what differs from the defaults in ``pipeline/config.py``."""
