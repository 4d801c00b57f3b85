"""Mechanisms in a model: layers, conversion of trained models, several processes."""
