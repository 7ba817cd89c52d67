"""The small models that lie beside the scripts, by name."""

from __future__ import annotations

from pathlib import Path

BASES = ("tiny_sam", "tiny_sam2")
DEFAULT = BASES[0]


def base_path(name: str | None) -> str | None:
    """What `--base` names: the folder of a small model, or a path, a Hub id or nothing as it is."""
    return str(Path(__file__).resolve().parent / name) if name in BASES else name
