"""Attention mechanisms, one file each, behind one operator interface. None has landed yet."""
