"""The kernels of xattn: one folder per op, each with a plain PyTorch reference; needs torch and Triton."""
