"""Operators: what a mechanism does to its values, without the N x N matrix."""
