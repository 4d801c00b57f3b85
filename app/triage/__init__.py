"""Triage of photos with tags, notes, ratings and named slices, and files that are made from a selection."""
