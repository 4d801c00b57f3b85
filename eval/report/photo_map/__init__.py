"""Shows the photos of a pack as points, placed by the classifier's features or by where it looks."""
