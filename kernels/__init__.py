"""Numerics of xattn: one folder an op, each with a plain-torch reference; imports torch and triton only."""
