"""Error against batch size for each norm, on real images, at the size of a laptop."""
