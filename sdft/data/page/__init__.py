"""The page of images to look at before a training."""
