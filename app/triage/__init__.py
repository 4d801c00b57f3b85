"""Triage: tags, notes and ratings of photos, named slices, and files made from a selection."""
