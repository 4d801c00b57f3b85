"""Mechanisms inside models: layers, conversion of trained models, parallel attention."""
