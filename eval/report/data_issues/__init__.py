"""Finds problems of a data set (wrong labels, duplicates, shortcuts), and retrains the last layer."""
