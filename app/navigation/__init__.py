"""Views as URLs: the address, the widgets bound to it, and the gallery's selection."""
