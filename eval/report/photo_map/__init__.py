"""The photos of a pack as points: by what the classifier reads of them, or by where it looks."""
