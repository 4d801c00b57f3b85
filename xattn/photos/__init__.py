"""Reading photos: files, data sets and clips, the model's crop, and the mapping back onto the photo."""
