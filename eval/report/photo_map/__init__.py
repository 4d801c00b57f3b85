"""Arranges the photos of a pack as points on a map, by the classifier's features or by where it looks."""
