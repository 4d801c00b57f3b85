"""Explain the words of vision-language models: which part of the image, and which words, led to each."""
