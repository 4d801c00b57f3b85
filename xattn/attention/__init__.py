"""Attention mechanisms, one per file, behind one operator interface; see :func:`create_attention`."""

import lazy_loader

from xattn.attention.record import record as record  # it has the same name as its module

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
