"""Reading pictures, under its former name; see [`peft_talora.data.images`]."""

from .data.images import ARRAY_SUFFIX, IMAGE_SUFFIXES, read_image, read_values

__all__ = ["ARRAY_SUFFIX", "IMAGE_SUFFIXES", "read_image", "read_values"]
