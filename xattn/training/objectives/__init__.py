"""What heads are trained for, by name: one file an objective, see :mod:`xattn.training.objectives.base`."""
