"""Where networks come from: timm, ``transformers``, traced modules, modules with hooks, CLIP."""
