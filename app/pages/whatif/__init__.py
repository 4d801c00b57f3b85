"""The What if page: hide a part of a photo and see how the network's answer changes."""
