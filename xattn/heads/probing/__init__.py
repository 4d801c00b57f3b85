"""Probing heads: pooled attention that a linear classifier reads, one file each."""
