"""Relevance and attention through the layers of a network, one method per file."""
