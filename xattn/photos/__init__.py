"""Photos in: files, data sets and clips, the model's crop, and the way back onto the photo."""
