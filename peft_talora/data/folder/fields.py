"""What the description of a folder says about one task: its fields, checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from ...kinds import KINDS, Numbers, TaskSpec
from ..columns import IGNORE_INDEX, TASK_COLUMNS
from .checks import NAME, checked, checked_pattern, is_a, is_list_of, known_fields, quoted


@dataclass(frozen=True)
class TaskFiles(Numbers):
    """Where a task's label files are and what their numbers mean; the latter is explained at [`Numbers`].

    Args:
        spec: The task.
        files: Patterns with ``{name}``, or subfolders, relative to the dataset's folder. The first that exists counts.
        optional: Whether there may be no file at all; the task is left out then.
        by_color: Whether the files' colours count; ``class_map`` then has them as numbers, see [`packed_colors`].
        flip_pairs: Classes that a flip swaps; None: what their names say.
    """

    spec: TaskSpec
    files: tuple[str, ...]
    optional: bool = False
    by_color: bool = False
    flip_pairs: tuple[tuple[int, int], ...] | None = None


def parse_task(name: str, fields: Any, where: str) -> TaskFiles:
    """Check the fields of a task; `where` stands before what is wrong with them."""
    if not isinstance(fields, Mapping):
        raise ValueError(f"{where}: expected fields such as 'kind' and 'files', got {quoted(fields)}")
    usual = TASK_COLUMNS[name].kind if name in TASK_COLUMNS else None
    kind = fields.get("kind", usual)
    if not isinstance(kind, str | None) or kind not in KINDS:
        raise ValueError(f"{where}.kind: unknown kind {quoted(kind)}, expected one of {', '.join(KINDS)}")
    if usual not in (None, kind):
        raise ValueError(f"{where}.kind: a task named {name!r} is of the kind {usual!r}, got {kind!r}: rename it")
    own_fields, by_color = KINDS[kind].own_fields, "colors" in fields
    class_fields = ("colors", "flip_pairs") if KINDS[kind].has_classes else ()
    known = ("kind", "files", "optional", *KINDS[kind].file_fields, *class_fields, *own_fields)
    known_fields(fields, known, where, f" of a {kind} task")
    files = fields.get("files", name)
    files = [files] if isinstance(files, str) else files
    if not isinstance(files, list | tuple) or not files:
        raise ValueError(f"{where}.files: expected a subfolder or a pattern with {NAME}, got {quoted(files)}")
    spec = _spec(kind, fields, where)
    own = {name: _own(check, fields[name], f"{where}.{name}") for name, check in own_fields.items() if name in fields}
    if any(channel >= spec.num_channels for channel in own.get("mirrored", ())):
        raise ValueError(
            f"{where}.mirrored: a channel is beyond the {spec.num_channels} channels, got {own['mirrored']}"
        )
    class_map = _color_map(fields, spec, where) if by_color else _class_map(fields, spec, where)
    return TaskFiles(
        spec=spec,
        files=tuple(checked_pattern(pattern, f"{where}.files") for pattern in files),
        optional=checked(fields, "optional", bool, where, False),
        by_color=by_color,
        flip_pairs=_flip_pairs(fields, spec, f"{where}.flip_pairs"),
        ignore=() if by_color else _ignore(fields, spec, class_map, own.get("first_class", 0), where),
        class_map=class_map,
        threshold=checked(fields, "threshold", Real, where),
        scale=_scale(fields, spec, where),
        offset=checked(fields, "offset", Real, where, 0.0),
        disparity=_disparity(fields, where),
        axes=_axes(fields, where),
        own=own,
    )


def packed_colors(colors: Any) -> np.ndarray:
    """Colours (..., 3) of 8 bits as one number each, int64 (...)."""
    colors = np.asarray(colors).astype(np.int64)
    return colors[..., 0] << 16 | colors[..., 1] << 8 | colors[..., 2]


def _own(check: Callable[[Any], Any], value: Any, where: str) -> Any:
    try:
        return check(value)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _spec(kind: str, fields: Mapping[str, Any], where: str) -> TaskSpec:
    names, channels = fields.get("class_names"), fields.get("num_channels")
    if names is not None and not is_list_of(names, str):
        raise ValueError(f"{where}.class_names: expected a list of the classes' names, got {quoted(names)}")
    if KINDS[kind].has_classes:
        # the files would have to be read for it otherwise, all of them
        channels = fields.get("num_classes", len(names) if names else None)
        if channels is None:
            raise ValueError(
                f"{where}.class_names: expected a list of the classes' names (or num_classes), got {quoted(names)}"
            )
    if channels is not None and not is_a(channels, int):
        raise ValueError(f"{where}: num_channels must be an integer >= 1, got {quoted(channels)}")
    try:
        return TaskSpec(kind, class_names=names, **({} if channels is None else {"num_channels": channels}))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _scale(fields: Mapping[str, Any], spec: TaskSpec, where: str) -> float:
    scale = checked(fields, "scale", Real, where, 1.0)
    if scale == 0 or (scale < 0 and spec.task_kind.is_distance):
        expected = "above 0, as a distance is" if spec.task_kind.is_distance else "another number than 0"
        raise ValueError(
            f"{where}.scale: expected a number {expected}, got {scale!r}: nothing would be left of the labels"
        )
    return scale


def _disparity(fields: Mapping[str, Any], where: str) -> float | None:
    value = checked(fields, "disparity", Real, where)
    if value is not None and value <= 0:
        raise ValueError(f"{where}.disparity: expected baseline x focal length, a number above 0, got {value!r}")
    return value


def _ignore(
    fields: Mapping[str, Any], spec: TaskSpec, class_map: Mapping[int, int] | None, first: int, where: str
) -> tuple[float, ...]:
    """Numbers of unlabelled pixels; without `ignore` that is 255 in class maps, unless it is the number of a class there."""
    is_class = IGNORE_INDEX in class_map if class_map else first + spec.num_channels > IGNORE_INDEX
    values = fields.get("ignore", [IGNORE_INDEX] if spec.task_kind.has_classes and not is_class else [])
    values = values if isinstance(values, list | tuple) else [values]
    if not is_list_of(values, Real):
        raise ValueError(f"{where}.ignore: expected a number or a list of numbers, got {quoted(fields['ignore'])}")
    both = next((number for number in values if number in (class_map or {})), None)
    if both is not None:
        raise ValueError(
            f"{where}.ignore: {both} is unlabelled here, and a class in `class_map`: leave it out of one of them"
        )
    return tuple(values)


def _class_map(fields: Mapping[str, Any], spec: TaskSpec, where: str) -> dict[int, int] | None:
    if "class_map" not in fields:
        return None
    values = fields["class_map"]
    try:
        pairs = {int(number): label for number, label in values.items()}  # JSON has strings as keys
    except (AttributeError, ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{where}.class_map: expected {{number in the file: class}}, got {quoted(values)}") from error
    if not pairs:
        raise ValueError(f"{where}.class_map: expected {{number in the file: class}}, got an empty one")
    if "first_class" in fields:
        raise ValueError(
            f"{where}.class_map: it says every number's class, so that `first_class` has no meaning: leave it out"
        )
    return {number: _class(label, spec, f"{where}.class_map") for number, label in pairs.items()}


def _color_map(fields: Mapping[str, Any], spec: TaskSpec, where: str) -> dict[int, int]:
    """{colour as a number: class} from {class: [r, g, b], or a list of such}."""
    without = [name for name in ("class_map", "ignore", "first_class") if name in fields]
    if without:
        raise ValueError(f"{where}.colors: where colours say the class, {without[0]!r} has no meaning: leave it out")
    values = fields["colors"]
    if not isinstance(values, Mapping) or not values:
        raise ValueError(f"{where}.colors: expected {{class: [r, g, b]}}, got {quoted(values)}")
    colors: dict[int, int] = {}
    for label, value in values.items():
        triples = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
        for triple in triples:
            if not is_list_of(triple, int, 3) or not all(0 <= part <= 255 for part in triple):
                raise ValueError(
                    f"{where}.colors.{quoted(label)}: expected [r, g, b] of 0 to 255, or a list of such, got {quoted(triple)}"
                )
            color, class_number = int(packed_colors(triple)), _class(label, spec, f"{where}.colors")
            if colors.setdefault(color, class_number) != class_number:
                raise ValueError(f"{where}.colors: {triple} stands for two classes")
    return colors


def _flip_pairs(fields: Mapping[str, Any], spec: TaskSpec, where: str) -> tuple[tuple[int, int], ...] | None:
    if "flip_pairs" not in fields:
        return None
    values = fields["flip_pairs"]
    if not isinstance(values, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in values):
        raise ValueError(f"{where}: expected pairs of classes that a flip swaps, got {quoted(values)}")
    pairs = tuple((_class(first, spec, where), _class(second, spec, where)) for first, second in values)
    classes = [label for pair in pairs for label in pair]
    if len(set(classes)) < len(classes):
        raise ValueError(f"{where}: a class has one partner, got {quoted(values)}")
    return pairs


def _class(label: Any, spec: TaskSpec, where: str) -> int:
    """A class by its name or number."""
    names = spec.class_names or []
    if isinstance(label, str) and label in names:
        return names.index(label)
    if isinstance(label, str) and label.isdigit():
        label = int(label)
    if is_a(label, int) and 0 <= label < spec.num_channels:
        return label
    known = f" {quoted(names)}" if names else ""
    raise ValueError(f"{where}: class {quoted(label)} is beyond the {spec.num_channels} classes{known}")


def _axes(fields: Mapping[str, Any], where: str) -> tuple[int, int, int]:
    axes = fields.get("axes", [1, 1, 1])
    if not is_list_of(axes, Real, 3) or any(axis not in (1, -1) for axis in axes):
        raise ValueError(f"{where}.axes: expected three factors 1 or -1, got {quoted(axes)}")
    return tuple(axes)
