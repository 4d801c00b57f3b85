"""Attention mechanisms, one per file. Importing a file registers its mechanism."""
