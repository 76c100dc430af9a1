"""How one matrix is stored and multiplied. `base.py` is the seam; one file a format."""

from fewer.formats.base import WeightFormat
from fewer.formats.dense import DenseFormat
from fewer.formats.int4 import Int4Format
from fewer.formats.int8 import Int8Format

FORMATS: dict[str, type[WeightFormat]] = {each.name: each for each in (DenseFormat, Int4Format, Int8Format)}

__all__ = ["FORMATS", "DenseFormat", "Int4Format", "Int8Format", "WeightFormat"]
