"""Numerics of xattn: one folder an op, each with a plain-torch reference; imports torch and triton only.

No op has landed yet: the heads of this release need none beyond torch.
"""
