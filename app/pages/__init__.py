"""The pages of the viewer, one module each with a function ``page(context)``."""
