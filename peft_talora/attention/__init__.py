"""SAM's attention without the N x N position bias."""

from .lean import lean_attention

__all__ = ["lean_attention"]
