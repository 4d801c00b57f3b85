"""The named training objectives of heads, one per file: see :mod:`xattn.training.objectives.base`."""
