"""Where the authors' numbers and the real photos are on some machines: beside the repository."""

from pathlib import Path

SHARED = Path(__file__).parents[2] / "shared"
PHOTOS = SHARED / "data/real_photos"
