"""Explain photos and clips: the maps of their top or named classes."""
