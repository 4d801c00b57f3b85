"""Views as addresses: the URL, the widgets it holds, and what the gallery selects."""
