"""Probing heads: attention pooling followed by a linear classifier, one per file."""
