"""Class activation maps: weighted sums of feature maps, one method per file."""
