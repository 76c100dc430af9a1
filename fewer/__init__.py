"""fewer: run, compare, compress and serve open language models with fewer bits, tokens, experts, layers and steps."""

__version__ = "0.1.0"
