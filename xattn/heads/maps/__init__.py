"""Heads that show where the evidence for a class is and keep the network's own classifier."""
