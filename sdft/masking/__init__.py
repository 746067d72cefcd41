"""Masks of images: made by a segmenter, one file beside each image."""
