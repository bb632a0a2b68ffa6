"""Recipes, mixing, the training run and its checkpoints."""
