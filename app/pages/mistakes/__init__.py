"""The page of mistakes: which classes are confused, and the maps of those photos."""
