"""Families of networks: timm, ``transformers``, traced modules, modules with hooks, CLIP, and others."""
