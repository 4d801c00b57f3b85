"""Finds what is wrong with a data set (labels, duplicates, shortcuts), and retrains the last layer."""
