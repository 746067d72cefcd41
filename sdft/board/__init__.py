"""The page of a run while it goes on, and one page over many runs: both are made of the files in run folders alone."""
