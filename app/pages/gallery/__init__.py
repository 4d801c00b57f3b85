"""The gallery: the page, its filters, its cells and its files."""
