"""Triton kernels run in the interpreter here; it has to be chosen before any of them is imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"
