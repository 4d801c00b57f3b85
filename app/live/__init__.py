"""Explains uploaded photos and clips while the user waits for the results."""
