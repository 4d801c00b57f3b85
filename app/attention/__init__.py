"""The attention of one image: reading it, and showing it in pictures and charts."""
