"""A little drawn world with captions: the same scene in four looks, made on the fly from (seed, index)."""
