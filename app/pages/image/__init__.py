"""The image page."""
