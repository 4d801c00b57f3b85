"""Benchmarks behind pages of docs/results; ``xattn bench`` has those that a user runs."""
