"""Whole networks that are no classifiers, and the heads that ship with xattn."""
