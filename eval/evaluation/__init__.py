"""Evaluating explanations: images in, one stream of forward passes, a state that survives a kill."""
