"""People in the street and what they wear: parts, saliency, edges."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rooms.edges import instance_edges
from scipy.io import loadmat

from .pictures import read_rgb, shrink, shrink_labels
from .writing import Options, RealSet, Sample, random_splits

ANNOTATIONS, NAMES = "annotations/pixel-level", "label_list.mat"
# the 59 tags in classes that are large enough to be learnt from a few hundred pictures
GROUPS = {
    "background": "null",
    "skin": "skin",
    "hair": "hair hat",
    "top": "blouse bodysuit bra cardigan hoodie intimate jumper shirt sweater sweatshirt swimwear t-shirt top vest",
    "coat": "blazer cape coat jacket suit",
    "dress or skirt": "dress romper skirt",
    "trousers": "jeans leggings panties pants shorts stockings tights",
    "shoes": "boots clogs flats heels loafers pumps sandals shoes sneakers socks wedges",
    "accessory": "accessories bag belt bracelet earrings glasses gloves necklace purse ring scarf sunglasses tie wallet watch",
}  # fmt: skip
CLASS_OF = {tag: number for number, tags in enumerate(GROUPS.values()) for tag in tags.split()}


def samples(clone: Path, options: Options) -> Iterator[Sample]:
    """Yield whole photos; edges are drawn at the size at which they are written, and so stay thin."""
    lookup = class_lookup(clone / NAMES)
    paths = sorted((clone / ANNOTATIONS).glob("*.mat"))
    for path, split in zip(paths, random_splits(len(paths), options.seed), strict=True):
        photo = read_rgb(clone / "photos" / f"{path.stem}.jpg")
        tags = loadmat(path)["groundtruth"]
        if tags.shape != photo.shape[:2]:
            raise ValueError(f"{path} has the shape {tags.shape}, its photo {photo.shape[:2]}")
        image = shrink(photo, options.size)
        parts = shrink_labels(lookup[tags], image.shape[:2])
        labels = {"parts": parts, "saliency": (parts > 0).astype(np.uint8), "edges": instance_edges(parts)}
        yield Sample(path.stem, split, image, labels)


def class_lookup(path: Path) -> np.ndarray:
    """Return the class (59,) uint8 of every tag's number.

    Raises:
        ValueError: If a tag belongs to no class.
    """
    tags = [str(entry[0]) for entry in loadmat(path)["label_list"][0]]
    unknown = [tag for tag in tags if tag not in CLASS_OF]
    if unknown:
        raise ValueError(f"{path} names the tag {unknown[0]!r}, which belongs to no class of {list(GROUPS)}")
    return np.array([CLASS_OF[tag] for tag in tags], np.uint8)


STREET = RealSet(
    repository="https://github.com/bearpaw/clothing-co-parsing",
    license="Apache-2.0, as the repository says; the photos are of a fashion site, ask before you publish them",
    tasks={"parts": {"class_names": list(GROUPS)}, "saliency": {}, "edges": {}},
    needs=("photos", ANNOTATIONS, NAMES),
    samples=samples,
    splits=("image",),
)
