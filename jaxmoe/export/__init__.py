"""Hugging Face checkpoints of compressed models: the folder, its configuration, its code and its model card."""
