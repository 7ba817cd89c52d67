"""Random changes of images and their labels, for training."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..kinds import TaskSpec
from ..msam.labels import resize_label

_WHOLE_WORD = re.compile("(?<![a-z])(left|right)(?![a-z])")
_SIDES = (_WHOLE_WORD, re.compile("(?<![a-z])(left|right)"), re.compile("(?<![a-z])(l|r)(?![a-z])"))
_OTHER_SIDE = {"left": "right", "right": "left", "l": "r", "r": "l"}


@dataclass(frozen=True)
class Augmentation:
    """Random scale-crop and horizontal flip.

    The image is cropped to H/s x W/s at a random place and enlarged to its old size, which brings everything closer:
    depth is divided by s. A flip negates the x of the normals, and makes of a left arm a right one: classes (or tasks)
    whose names differ in left and right are swapped. Where one of them has no partner, nothing is flipped.

    Args:
        scales: The s to choose from, all >= 1.
        flip_probability: How often the image is flipped.
        flip_pairs: ``{task: pairs of classes that a flip swaps}``; default: what `class_names` says. An empty list: a flip
            swaps none.
        mirrored: ``{task: channels that a flip negates}``, for regression with a direction, such as the x of a flow.

    Raises:
        ValueError: If a scale is below 1 or the probability is not in [0, 1].
    """

    scales: tuple[float, ...] = (1.0, 1.2, 1.5)
    flip_probability: float = 0.5
    flip_pairs: Mapping[str, Sequence[tuple[int, int]]] = field(default_factory=dict)
    mirrored: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.scales or not min(self.scales) >= 1:
            raise ValueError(f"scales must be at least one number >= 1, got {self.scales}")
        if not 0 <= self.flip_probability <= 1:
            raise ValueError(f"flip_probability must be in [0, 1], got {self.flip_probability}")

    def __call__(
        self, rng: np.random.Generator, image: np.ndarray, labels: Mapping[str, Tensor], specs: Mapping[str, TaskSpec]
    ) -> tuple[np.ndarray, dict[str, Tensor]]:
        """Change an image, uint8 (H, W, 3), and its label maps, as ``label_tensor`` makes them, in the same way."""
        labels = dict(labels)
        scale = float(rng.choice(self.scales))
        height, width = image.shape[0], image.shape[1]
        crop = (max(1, int(height / scale)), max(1, int(width / scale)))
        top, left = (int(rng.integers(0, old - new + 1)) for old, new in zip(image.shape[:2], crop, strict=True))
        flip = bool(rng.random() < self.flip_probability)
        if crop != (height, width):
            box = (slice(top, top + crop[0]), slice(left, left + crop[1]))
            image = _enlarge(image[box], (height, width))
            labels = {name: _zoom_label(specs[name], label, box, scale) for name, label in labels.items()}
        if flip and not self.unflippable({name: specs[name] for name in labels}):
            image = image[:, ::-1]
            labels = self._flip(labels, specs)
        return image, labels

    def unflippable(self, specs: Mapping[str, TaskSpec]) -> dict[str, str]:
        """``{task: why}`` of the tasks for which no image is flipped: something of one side has no partner."""
        reasons = {}
        for name, spec in specs.items():
            alone = [] if name in self.flip_pairs else _sides(tuple(spec.class_names or ()))[1]
            if alone:
                reasons[name] = f"its class {alone[0]!r} has no partner on the other side"
        for name in _sides(tuple(specs))[1]:
            reasons.setdefault(name, "there is no such task of the other side")
        for name, partner in _task_pairs(specs):
            if specs[name].kind != specs[partner].kind or specs[name].num_channels != specs[partner].num_channels:
                reasons.setdefault(name, f"its partner {partner!r} is of another kind")
        return reasons

    def _flip(self, labels: Mapping[str, Tensor], specs: Mapping[str, TaskSpec]) -> dict[str, Tensor]:
        flipped = {name: self._flip_label(name, specs[name], label) for name, label in labels.items()}
        for name, partner in _task_pairs(labels):
            flipped[name], flipped[partner] = flipped[partner], flipped[name]
        return flipped

    def _flip_label(self, name: str, spec: TaskSpec, label: Tensor) -> Tensor:
        label = label.flip(-1)
        for channel in (*spec.task_kind.negated_by_flip, *self.mirrored.get(name, ())):
            label[channel] = -label[channel]
        pairs = self.flip_pairs.get(name, _sides(tuple(spec.class_names or ()))[0])
        if not pairs:
            return label
        first, second = (torch.tensor(classes) for classes in zip(*pairs, strict=True))
        swapped = torch.arange(spec.num_channels)
        swapped[first], swapped[second] = second, first
        if spec.task_kind.layout == "channels":
            return label[swapped]
        known = spec.task_kind.labelled(label, spec.ignore_index)
        return torch.where(known, swapped[torch.where(known, label, 0)], label)


@lru_cache(maxsize=64)
def _sides(names: tuple[str, ...]) -> tuple[list[tuple[int, int]], list[str]]:
    """Names that differ in "left" and "right", or in L and R: pairs of their numbers, and the names without a partner.

    L and R count only where both are there, and so do "left" and "right" as a part of a longer word.
    """
    # "leftArm" is two words
    words = [re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).casefold() for name in names]
    pairs, alone = [], []
    for number, word in enumerate(words):
        partners = {pattern.sub(lambda match: _OTHER_SIDE[match[0]], word) for pattern in _SIDES} - {word}
        partner = next((words.index(partner) for partner in partners if partner in words), None)
        if partner is None and _WHOLE_WORD.search(word):
            alone.append(names[number])
        elif partner is not None and number < partner:
            pairs.append((number, partner))
    return pairs, alone


def _task_pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    names = tuple(names)
    return [(names[first], names[second]) for first, second in _sides(names)[0]]


def _enlarge(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def _zoom_label(spec: TaskSpec, label: Tensor, box: tuple[slice, slice], scale: float) -> Tensor:
    zoomed = resize_label(spec, label[..., box[0], box[1]], tuple(label.shape[-2:]))
    return zoomed / scale if spec.task_kind.is_distance else zoomed
