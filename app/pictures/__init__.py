"""What leaves a pack as pixels or files: overlays, films, exports."""
