"""Curves, numbers and pictures for accelerate's trackers: TensorBoard, Trackio, Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from PIL import Image

import peft_talora as pt


def check_installed(report_to: str) -> None:
    """Refuse a tracker whose package is missing, before anything is trained.

    Raises:
        ImportError: The message says what to install.
    """
    if report_to != "none" and report_to not in map(str, get_available_trackers()):
        raise ImportError(f"--report-to {report_to}: the package is not installed: pip install {report_to}")


def log_step(
    accelerator: Accelerator, model: Any, method: str, step: int, losses: Mapping[str, float], optimizer: Any
) -> None:
    """Losses and learning rates of a step, and of Conv-LoRA how much its experts are used."""
    if not accelerator.trackers:
        return
    values = {f"{method}/loss/{name}": loss for name, loss in losses.items()}
    values |= {f"learning rate/{group['name']}": group["lr"] for group in optimizer.param_groups}
    if method == "convlora":
        values |= usage_shares(accelerator.unwrap_model(model))
    accelerator.log(values, step=step)


def log_results(
    accelerator: Accelerator, name: str, found: Mapping[str, Mapping[str, float | None]], step: int
) -> None:
    """Metrics of an evaluation."""
    values = {f"{name}/{task}/{metric}": value for task, metrics in found.items() for metric, value in metrics.items()}
    accelerator.log({name: value for name, value in values.items() if value is not None}, step=step)


def log_picture(accelerator: Accelerator, path: Path, step: int) -> None:
    """A picture, by trackers that take any."""
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            tracker.log_images({path.stem: np.asarray(Image.open(path).convert("RGB"))[None]}, step=step)


def usage_shares(model) -> dict[str, float]:
    """Which share of a layer's windows each expert of Conv-LoRA got in the last forward."""
    return {
        f"convlora/experts/{layer.removeprefix('base_model.model.')}/{scale}x": count / sum(counts)
        for layer, counts in ((layer, counts.tolist()) for layer, counts in pt.expert_usage(model).items())
        for scale, count in enumerate(counts, start=1)
    }
