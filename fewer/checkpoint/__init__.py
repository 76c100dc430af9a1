"""Checkpoints: names to files, files to tensors under canonical names, tokenizers."""
