"""Triage: tags, notes and ratings of photos, named slices, and what leaves a selection as files."""
