"""One page in one file that shows a comparison: pictures first, then figures, then the reader's own vote."""
