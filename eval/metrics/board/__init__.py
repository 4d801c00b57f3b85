"""Metrics of tables of outcomes and contrasts, which no shape of a map can win, and what stands beside."""
