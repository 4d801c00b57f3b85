"""Attention mechanisms, one file each, which registers itself."""
