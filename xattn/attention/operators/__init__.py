"""Operators, which apply a mechanism's attention to values without storing the N x N matrix."""
