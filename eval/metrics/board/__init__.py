"""Metrics of a board, which use tables of outcomes and contrasts so that a map's shape alone earns
nothing."""
