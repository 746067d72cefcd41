"""Pages as one HTML file: scripts, style and data inside, and no request to a network."""
