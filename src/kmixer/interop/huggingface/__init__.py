"""Hugging Face: models as classes of transformers, and folders that can be pushed to its hub and read back."""
