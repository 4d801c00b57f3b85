"""Computes the attention of one image, and shows it in pictures and charts."""
