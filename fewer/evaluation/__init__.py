"""Perplexity, divergence, speed and memory of a loaded model, and the comparison of recipes with its reports."""
