"""Metrics on mosaics of photos, apart from the grid pointing game."""
