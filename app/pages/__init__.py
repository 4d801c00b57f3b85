"""The pages of the viewer; each is a module with a function ``page(context)``, see ``state.PAGES``."""
