"""Metrics on mosaics of photos, beside the grid pointing game."""
