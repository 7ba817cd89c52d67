"""What a run leaves beside its checkpoints: the adapter, metrics.json, and a few words."""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

import peft_talora as pt
from peft_talora.metrics import HIGHER_IS_BETTER

from .checkpoints import check_arguments, has_more_steps
from .folder import disk_error
from .options import option

WEIGHTS_FILE = "adapter_model.safetensors"
PACKAGES = ("peft-talora", "torch", "transformers", "peft", "accelerate", "datasets")
# metrics of maps that were restored to the labels' own size
RESOLUTION = "labels"


def table(columns: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> str:
    """Results side by side: a row per metric that any of them has, with the better direction."""
    rows = dict.fromkeys(
        (task, metric) for found in columns.values() for task, metrics in found.items() for metric in metrics
    )
    lines = [["task", "metric", *columns]]
    for task, metric in rows:
        better = {True: " (up)", False: " (down)", None: ""}[HIGHER_IS_BETTER.get(metric)]
        values = [(found.get(task) or {}).get(metric) for found in columns.values()]
        lines.append([task, metric + better, *("-" if value is None else f"{value:.4f}" for value in values)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [[*map(str.ljust, line[:2], widths), *map(str.rjust, line[2:], widths[2:])] for line in lines]
    return "\n".join("  ".join(line) for line in aligned)


def read_baseline(path: str) -> dict[str, dict[str, float | None]]:
    """The results in a metrics.json.

    Raises:
        ValueError: It is none.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))["tasks"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--baseline {path} is no metrics.json of this script: {error!r}") from error


def finished_baseline(path: Path, arguments: dict[str, Any]) -> dict[str, dict[str, float | None]] | None:
    """The results of a baseline that is finished; None where it is not, or was, and the run has more steps now.

    Raises:
        ValueError: It had other arguments.
    """
    if not path.is_file():
        return None
    saved = json.loads(path.read_text(encoding="utf-8"))
    check_arguments(saved["arguments"], arguments, path)
    return None if has_more_steps(saved["arguments"], arguments) else saved["tasks"]


def save_adapter(args: argparse.Namespace, model, processor: pt.MSamProcessor, found: dict | None = None) -> None:
    """Save the adapter with its processor; a save that fails leaves the former one.

    Raises:
        NotWritten: The message says where to, and how full the disk is.
    """
    try:
        pt.save_adapter(model, args.output_dir, metrics=found, dataset=args.dataset if found else None)
        processor.save_pretrained(args.output_dir)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise disk_error("the adapter", args.output_dir, error) from error


def summary(args, data, model, found, classes, baseline, trained=None) -> dict[str, Any]:
    """What metrics.json says.

    Args:
        args: The options.
        data: The `Data`.
        model: The PeftModel.
        found: {task: {metric: value}}.
        classes: {task: {class: IoU}}.
        baseline: As `found`, of what Delta_b compares with; or None.
        trained: The `Trained`; None where nothing was.
    """
    weights = Path(args.init_from or "") if args.eval_only else args.output_dir
    delta = None
    if baseline is not None:
        with contextlib.suppress(ValueError):
            delta = pt.delta_b(found, baseline)
    return {
        "method": args.method,
        "seed": args.seed,
        "steps": trained.steps if trained else 0,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "adapter_bytes": (weights / WEIGHTS_FILE).stat().st_size if (weights / WEIGHTS_FILE).is_file() else None,
        "train_seconds": round(trained.seconds, 2) if trained else 0.0,
        "tasks": found,
        "baseline": baseline,
        "delta_b": delta,
        "class_iou": classes,
        "best": trained.best.summary() if trained and trained.best else None,
        "metrics_resolution": RESOLUTION,
        "dataset": {
            "name": args.dataset,
            "train_images": None if args.eval_only else len(data.train),
            "test_images": len(data.test),
            "tasks": {name: spec.to_dict() for name, spec in data.tasks.items()},
        },
        "arguments": {option(name): value for name, value in vars(args).items()},
        "versions": {"python": platform.python_version()} | {name: installed(name) for name in PACKAGES},
    }


def installed(package: str) -> str | None:
    with contextlib.suppress(ImportError):
        return version(package)
    return None


def in_words(args: argparse.Namespace, model, values: Mapping[str, Any]) -> str:
    """A table of the results, and what was trained."""
    found, baseline = values["tasks"], values["baseline"]
    columns = {args.method: found} if baseline is None else {"baseline": baseline, args.method: found}
    lines = ["", table(columns), ""]
    if not args.eval_only:
        trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        adapter = sum(number for name, number in trained.items() if ".modules_to_save." not in name)
        lines.append(
            f"{sum(trained.values()):,} trained parameters, {adapter:,} of them the adapter's own ({adapter * 4 / 1e6:.2f} MB of "
            f"{values['adapter_bytes'] / 1e6:.2f} MB in the file: the rest are the tasks' decoders and the encoder's norms); "
            f"{values['train_seconds']:.0f} s of training"
        )
    if values["best"]:
        lines.append(
            "kept is the adapter of step {step}: {metric} {value:.4f} on validation images".format(**values["best"])
        )
    if args.method == "convlora" and not args.eval_only:
        counts = sum(pt.expert_usage(model).values())
        shares = ", ".join(f"{scale}x {share:.0%}" for scale, share in enumerate(counts / counts.sum(), start=1))
        lines.append(f"Experts in use in the last forward, all layers: {shares}")
    if values["delta_b"] is not None:
        lines.append(f"Delta_b over the baseline: {values['delta_b']:+.1f} %")
    return "\n".join(lines)
