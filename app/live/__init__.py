"""Explains uploaded photos and clips while the page waits."""
