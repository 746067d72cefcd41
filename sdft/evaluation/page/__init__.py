"""The report of a comparison as one HTML file: images, metrics, trade-off, and a blind vote."""
