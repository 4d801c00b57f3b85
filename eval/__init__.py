"""Measures how faithful explanations are: metrics, protocols, sanity rows, intervals and reports.

``evaluate(backbone, {name: explainer}, images) -> Results`` runs a complete evaluation. The public names,
listed in ``__init__.pyi``, are loaded on first use, so importing this package is cheap.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
