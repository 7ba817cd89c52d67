"""How time and memory grow with the number of tasks, of channels, and of pixels."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

import peft_talora as pt

from .attention import attending
from .decoder import decoding
from .measuring import clocked, needs_more, peak_memory
from .models import SIZES, Size, adapted_msam, label_maps, pixels

# what is on the x axis of each panel, and where it is measured
AXES = {
    "tasks": (1, 2, 3, 4, 6, 8),
    "channels": (1, 2, 4, 8, 13, 20, 40),
    "image side in pixels": (256, 384, 512, 768, 1024),
}
# `--size tiny` is for tests
SHORT_AXES = {"tasks": (1, 3), "channels": (1, 3), "image side in pixels": (256, 320)}


@dataclass
class Point:
    """One way at one place of an axis, forward and backward: seconds per round and peak bytes."""

    size: str
    axis: str
    way: str
    x: int
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def median(self, clock: str = "seconds") -> float:
        """`clock` is "seconds" or "cpu_seconds"."""
        return statistics.median(getattr(self, clock))


def growth(args: argparse.Namespace) -> Iterator[Point]:
    """All points, axis by axis."""
    for name in args.sizes:
        size = SIZES[name]
        for axis, places in (SHORT_AXES if name == "tiny" else AXES).items():
            for x in places:
                for way, call in WAYS[axis](size, x, args).items():
                    yield measure_point(Point(name, axis, way, x), call, args)


def measure_point(point: Point, call: Callable[[], None], args: argparse.Namespace) -> Point:
    """As [`measuring.measure`], in a third of the time: there are many points."""
    point.peak_bytes = peak_memory(call, args.device)
    brief = argparse.Namespace(rounds=min(args.rounds, 3), seconds=args.seconds / 10, longest=args.longest / 10)
    elapsed = 0.0
    while needs_more(len(point.seconds), elapsed, brief):
        wall, cpu = clocked(call, args.device)
        point.seconds.append(wall)
        point.cpu_seconds.append(cpu)
        elapsed += wall
    return point


def by_tasks(size: Size, number: int, args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """An mSAM's forward, loss and backward for `number` tasks of an image."""
    tasks = {f"task_{index}": pt.TaskSpec("depth") for index in range(number)}
    images = pixels(1, size.image_size, args)
    labels = label_maps(tasks, 1, size.image_size, args.device)
    ways = {"all layers task-aware": None, "the last half": list(range(size.layers // 2, size.layers))}
    calls = {}
    for way, layers in ways.items():
        model = adapted_msam(size, tasks, pt.TALoraConfig(r=size.rank, layers_to_transform=layers), args)
        calls[way] = lambda model=model: backward_of_loss(model, images, labels)
    return calls


def backward_of_loss(model: nn.Module, images: torch.Tensor, labels: dict[str, torch.Tensor]) -> None:
    model.zero_grad()
    model(images, labels=labels).loss.backward()


def by_channels(size: Size, number: int, args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """The decoder of one task alone."""
    size = dataclasses.replace(size, images=1)
    return {f"{mode} mode": decoding(size, mode, number, args)["training"] for mode in ("prompt", "token")}


def by_side(size: Size, side: int, args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """A global and a windowed layer of attention on an image of side x side pixels."""
    grid = side // 16
    windows = (-(-grid // 14)) ** 2
    # where one layer is measured the width does not matter for how it grows
    calls = attending(size.hidden, size.heads, (1, grid, grid), args)
    windowed = attending(size.hidden, size.heads, (windows, 14, 14), args)
    what = "forward and backward"
    return {
        "global, plain": calls["plain"][what],
        "global, lean": calls["lean"][what],
        "windowed, plain": windowed["plain"][what],
        "windowed, lean": windowed["lean"][what],
    }


WAYS = {"tasks": by_tasks, "channels": by_channels, "image side in pixels": by_side}


def draw(points: list[Point], path: Path, clock: str) -> None:
    """One panel per axis: time by that clock above, memory below, against what is on the axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes = list(dict.fromkeys(point.axis for point in points))
    figure, panels = pyplot.subplots(2, len(axes), figsize=(5 * len(axes), 7), sharex="col", squeeze=False)
    for column, axis in zip(panels.T, axes, strict=True):
        own = [point for point in points if point.axis == axis]
        for way in dict.fromkeys((point.size, point.way) for point in own):
            line = [point for point in own if (point.size, point.way) == way]
            label = way[1] if len({point.size for point in points}) == 1 else f"{way[0]}: {way[1]}"
            places = [point.x for point in line]
            column[0].plot(places, [point.median(clock) * 1e3 for point in line], marker="o", label=label)
            column[1].plot(places, [point.peak_bytes / 2**20 for point in line], marker="o", label=label)
        column[0].set_ylabel("forward and backward, " + ("ms of CPU time" if clock == "cpu_seconds" else "ms"))
        column[1].set_ylabel("peak memory, MiB")
        column[1].set_xlabel(axis)
        column[0].legend()
        for panel in column:
            panel.set_ylim(bottom=0)
            panel.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
