"""The trainable parts of distillation and pruning, and their closeness to the original network."""
