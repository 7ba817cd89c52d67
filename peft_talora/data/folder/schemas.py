"""Descriptions of datasets whose layout is known, as their ``dataset.yaml`` would give them.

`tanganke/nyuv2` and other rows of that schema need none: see [`TASK_COLUMNS`]. The seven classes of CityScapes that are
prepared in that schema (image, segmentation, depth) load as they are, too; their "depth" is a normalised disparity.
"""

from __future__ import annotations

from typing import Any

# The 7 categories of Cityscapes and the ids that its labelIds.png have for them; the others are void.
_CITYSCAPES_IDS = {
    "flat": range(7, 11),
    "construction": range(11, 17),
    "object": range(17, 21),
    "nature": range(21, 23),
    "sky": range(23, 24),
    "human": range(24, 26),
    "vehicle": range(26, 34),
}

# The stereo camera of Cityscapes: baseline in metres x focal length in pixels.
_CITYSCAPES_STEREO = 0.209313 * 2262.52

# As it is unpacked: leftImg8bit, gtFine and disparity side by side. disparity.png has 16 bits: 0 is unknown, and
# (value - 1) / 256 is the disparity in pixels, from which the depth in metres follows.
CITYSCAPES: dict[str, Any] = {
    "images": "leftImg8bit/{name}_leftImg8bit.png",
    "splits": "subfolders",
    # its labels are dummies: the real ones are not published
    "skip_splits": ["test"],
    "tasks": {
        "semantic": {
            "files": "gtFine/{name}_gtFine_labelIds.png",
            "class_names": list(_CITYSCAPES_IDS),
            "class_map": {i: label for label, ids in enumerate(_CITYSCAPES_IDS.values()) for i in ids},
        },
        "depth": {
            "files": "disparity/{name}_disparity.png",
            "scale": 1 / 256,
            "offset": -1 / 256,
            "disparity": _CITYSCAPES_STEREO,
        },
    },
}

_VOC_CLASSES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
)

# As multi-task papers use it: saliency and normals are distilled from other networks. The parts are class maps: those
# that come as .mat files have to be drawn into .png first. Normals keep the directions of their files.
PASCAL_CONTEXT: dict[str, Any] = {
    "images": "JPEGImages/{name}.jpg",
    "splits": {"train": "ImageSets/Context/train.txt", "validation": "ImageSets/Context/val.txt"},
    "tasks": {
        "semantic": {
            "files": ["semseg/VOC12/{name}.png", "semseg/pascal-context/{name}.png"],
            "class_names": _VOC_CLASSES.split(),
            "optional": True,
        },
        "parts": {
            "files": "human_parts/{name}.png",
            "class_names": ["background", "head", "torso", "upper arm", "lower arm", "upper leg", "lower leg"],
            "optional": True,
        },
        "saliency": {"files": "sal_distill/{name}.png", "threshold": 128, "optional": True},
        "normals": {"files": "normals_distill/{name}.png", "optional": True},
    },
}

SCHEMAS: dict[str, dict[str, Any]] = {"cityscapes": CITYSCAPES, "pascal_context": PASCAL_CONTEXT}
