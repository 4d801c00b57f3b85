"""Benchmarks behind the pages of docs/results; benchmarks for users are in ``xattn bench``."""
