"""A run: what identifies it, and its way through checkpoints."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from . import folder
from .best import BestAdapter
from .checkpoints import Checkpoint, find_checkpoint, random_state, save_checkpoint, set_random_state
from .data import Data
from .options import option
from .stopping import Diverged, Interruption

# options that a resumed run may change: they do not change what is trained
FREE_OPTIONS = ("check", "output_dir", "overwrite", "resume", "checkpoint_every", "keep_checkpoints", "eval_every", "eval_only", "patience",
                "baseline", "report_to", "num_workers", "num_threads", "gradient_checkpointing", "push_to_hub")  # fmt: skip


@dataclass
class Run:
    """One training: that of the method, or that of the baseline.

    Attributes:
        args: The options.
        accelerator: accelerate's.
        data: What it is trained and evaluated on.
        interruption: Where Ctrl-C and SIGTERM arrive.
        method: What is trained.
        name: The run's identity, in its checkpoints.
        checkpoints: Their folder.
        model: The model to start from, instead of a fresh one.
    """

    args: argparse.Namespace
    accelerator: Accelerator
    data: Data
    interruption: Interruption
    method: str
    name: str
    checkpoints: Path
    model: Any = None

    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the run before it."""
        named = {option(name): value for name, value in vars(self.args).items() if name not in FREE_OPTIONS}
        return {
            **named,
            **self.data.identity,
            "--method": self.method,
            "--tasks": list(self.data.tasks),
            "--mixed-precision": self.accelerator.mixed_precision,
            "training rows": len(self.data.train),
            "test rows": len(self.data.test),
            "processes": self.accelerator.num_processes,
        }


def begin(run: Run, checkpoint: Checkpoint | None) -> str:
    """Prepare the output directory for a run: its identity. What an earlier run left there is moved, never removed."""
    directory, resume = run.args.output_dir, run.args.resume
    going_on = resume == "latest" or (
        checkpoint and checkpoint.directory.resolve().parent == run.checkpoints.resolve()
    )
    marker = folder.read_marker(directory)
    if going_on:
        name = (checkpoint and checkpoint.run) or (marker and marker["run"]) or folder.new_run_id()
        folder.tell_of_earlier(directory, checkpoint.step if checkpoint else 0)
    else:
        name = folder.new_run_id()
        moved = folder.set_aside(directory)
        if moved:
            print(
                f"the checkpoints of an earlier run are now in {moved}; --resume latest would have gone on from them"
            )
    folder.write_marker(directory, name, run.identity())
    return name


@contextlib.contextmanager
def at_step(run: Run, step: int) -> Iterator[None]:
    """Say where numbers that are not finite came up, and what is left."""
    try:
        yield
    except Diverged as error:
        good = find_checkpoint("latest", run.checkpoints, None, lambda _: None)
        left = f"the last good checkpoint is {good.directory}" if good else "there is no checkpoint yet"
        raise Diverged(
            f"{run.method}, step {step}: {error}. Training has stopped; {left}. Try a lower learning rate."
        ) from error


def save(run: Run, step: int, model, optimizer, scheduler, best: BestAdapter | None, seconds: float) -> Path | None:
    """Write a checkpoint, the states of all processes by the first one. Where it cannot be written, training continues."""
    accelerator, unwrapped = run.accelerator, run.accelerator.unwrap_model(model)
    if not all(parameter.isfinite().all() for parameter in unwrapped.parameters() if parameter.requires_grad):
        raise Diverged("the trained weights are not finite any more")
    state = {
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "scaler": accelerator.scaler and accelerator.scaler.state_dict(),
        "random": gather_object([random_state()]),
        "best": best and best.state_dict(),
        "seconds": seconds,
    }
    saved = None
    if accelerator.is_main_process:
        try:
            keep = run.args.keep_checkpoints
            saved = save_checkpoint(run.checkpoints, step, unwrapped, state, run.identity(), keep, run.name)
        except OSError as error:
            tqdm.write(f"{error}; the checkpoints before it stay, and training continues", file=sys.stderr)
    accelerator.wait_for_everyone()
    return saved


def resume(accelerator: Accelerator, checkpoint: Checkpoint, optimizer, scheduler, best: BestAdapter | None) -> float:
    """Take over a checkpoint's optimiser, schedule and random numbers: the seconds of training that it stands for."""
    state = checkpoint.training_state()
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    if best:
        best.load_state_dict(state["best"])
    set_random_state(state["random"][accelerator.process_index])
    return state["seconds"]
