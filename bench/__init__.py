"""Sparse layers timed against dense torch, layer by layer: ``python -m bench --help``."""
