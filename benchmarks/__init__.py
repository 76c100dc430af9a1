"""Measurements against stated targets and against other engines; not part of the package."""
