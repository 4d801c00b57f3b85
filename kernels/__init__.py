"""Kernels of xattn: one folder per op, each with a plain PyTorch reference; needs only torch and Triton."""
