"""Pictures and files made from a pack: overlays, films and exports."""
