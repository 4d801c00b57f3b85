"""Boards: folders of results that others check, audit and add a row to."""
