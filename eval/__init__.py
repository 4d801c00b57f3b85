"""Fidelity of explanations: metrics, protocols, sanity rows, intervals and reports.

``evaluate(backbone, {name: explainer}, images) -> Results`` is the whole job; the names of ``__init__.pyi``
load on first use, so that importing this package costs nothing.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
