"""Executes forward passes: `Session` holds a batch of sequences, `Runner` picks the fastest exact way."""
