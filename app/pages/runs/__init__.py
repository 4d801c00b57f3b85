"""Two runs on the same photos."""
