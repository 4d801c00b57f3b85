"""Attention mechanisms, one per file; each registers itself."""
