"""The Map page: the photos of a pack as points, and groups on which the network looks at the same place."""
