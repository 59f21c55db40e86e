"""Compression of a checkpoint: recipes, budgets, and the one engine that carries every step out."""
