"""The page What if: hide a part of a photo, and see what the network says then."""
