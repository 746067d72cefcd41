"""The page of captions: a card for each image, to read, correct and export."""
