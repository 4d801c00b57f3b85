"""Benchmarks of `xattn bench`: ratios of times measured in one run."""
