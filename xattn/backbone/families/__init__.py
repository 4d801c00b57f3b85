"""Network families: timm, ``transformers``, traced modules, modules with hooks, CLIP."""
