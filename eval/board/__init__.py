"""Boards: folders of results that other people can check, audit and add rows to."""
