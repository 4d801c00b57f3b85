"""The pages of the viewer: for each a module with a function ``page(context)``; see ``state.PAGES``."""
