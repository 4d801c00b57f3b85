"""Heads that show where the evidence for a class is; the network's own classifier stays."""
