"""Makes a repository of the Hugging Face Hub of a finished run: weights, pictures, and a model card."""
