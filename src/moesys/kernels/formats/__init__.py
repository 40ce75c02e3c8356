"""Weight formats of less than two bytes, each defined once: packing, unpacking, error."""

from moesys.kernels.formats.int8 import GROUP_SIZE, Int8Product, Int8Weight, pack_int8, round_to_int8

__all__ = ["GROUP_SIZE", "Int8Product", "Int8Weight", "pack_int8", "round_to_int8"]
