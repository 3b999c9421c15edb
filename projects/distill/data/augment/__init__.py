"""Augmentations that combine images: mosaic, mixup, and what belongs to their recipes."""
