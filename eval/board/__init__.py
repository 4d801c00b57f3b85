"""Boards: folders of results to which other people can add rows, and which they can check and audit."""
