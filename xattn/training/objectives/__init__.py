"""Training objectives of heads, by name, one per file: see :mod:`xattn.training.objectives.base`."""
