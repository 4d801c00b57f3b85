"""Whole networks that are not classifiers, and the heads that ship with xattn."""
