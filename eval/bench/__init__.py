"""The benchmarks of ``xattn bench``, which report ratios of times measured in one run."""
