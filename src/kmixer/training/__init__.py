"""Training: recipes, the loop, optimisers, checkpoints in run folders, evaluation."""
