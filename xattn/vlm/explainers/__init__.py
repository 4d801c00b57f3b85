"""Token explainers, a file each: scores of image and text tokens for every word of an answer."""
