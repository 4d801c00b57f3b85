"""The benchmarks of ``xattn bench``, which report ratios of times that were measured in the same run."""
