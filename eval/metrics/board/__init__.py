"""Metrics of a board: tables of outcomes and contrasts, in which a map's shape alone earns nothing."""
