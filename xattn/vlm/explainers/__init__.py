"""Token explainers, one per file: scores of image and text tokens for every word of an answer."""
