"""What is measured on a model: evaluation, learned dynamics, locality, levels."""
