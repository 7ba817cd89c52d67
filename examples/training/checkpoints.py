"""Checkpoints of a training run: each is complete or not there, and none holds the base model.

A checkpoint is a directory ``step-N`` with the adapter as `peft_talora.save_adapter` writes it, ``training_state.pt``
(what else a run needs to resume; tensors, numbers and containers of them, read without unpickling objects) and
``checkpoint.json``: the step, the run and its arguments, and the checksum of every file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file

import peft_talora as pt
from peft_talora.saving.directory import written_aside
from peft_talora.saving.settings import split_settings

from .folder import CHECKPOINT_RECORD as RECORD_FILE
from .folder import disk_error

STATE_FILE = "training_state.pt"
WEIGHTS_FILE = "adapter_model.safetensors"
STEPS = "--steps"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are what was written."""

    directory: Path
    step: int
    arguments: dict[str, Any]
    run: str | None

    def load_adapter(self, model: PeftModel) -> None:
        """Put the trained weights into a model that was built as the run built it."""
        weights = load_file(self.directory / WEIGHTS_FILE)
        names, saved = split_settings(weights)
        own_names, own = split_settings(get_peft_model_state_dict(model))
        differing = names.keys() ^ own_names.keys()
        if differing:
            raise ValueError(f"{self.directory}: the checkpoint or the model has no tensor {min(differing)!r}")
        # another version of the script may choose other ones
        differing = {name for name, value in (saved or {}).items() if own is not None and own.get(name) != value}
        if differing:
            told = ", ".join(f"{name}={saved[name]!r}, now {own.get(name)!r}" for name in sorted(differing))
            raise ValueError(
                f"{self.directory}: the adapter was begun with {told}: resume it with the version that began it"
            )
        set_peft_model_state_dict(model, weights)

    def training_state(self) -> dict[str, Any]:
        return torch.load(self.directory / STATE_FILE, map_location="cpu", weights_only=True)


def save_checkpoint(
    folder: Path,
    step: int,
    model: PeftModel,
    state: dict[str, Any],
    arguments: dict[str, Any],
    keep: int,
    run: str | None = None,
) -> Path:
    """Write ``folder/step-N`` and remove all but the last `keep` of this run's up to it.

    Killed at any moment, this leaves every checkpoint complete or not there, and at least one where there was one.

    Args:
        folder: Where the run's checkpoints are.
        step: N, the optimiser steps done.
        model: Its adapter is saved.
        state: What else the run needs, as ``torch.load(weights_only=True)`` can read it.
        arguments: What [`check_arguments`] compares a resumed run with; JSON.
        keep: How many to keep, >= 1.
        run: The run's identity; checkpoints of other runs are not removed.

    Raises:
        OSError: It could not be written; the message says where to, and how full the disk is. Nothing is removed then.
    """
    directory = folder / f"step-{step}"
    _remove_leftovers(folder)
    # a damaged one, or one that lies after the checkpoint that the run was told to resume
    former = _hide(directory) if directory.exists() else None
    try:
        with written_aside(directory) as aside:
            pt.save_adapter(model, aside)
            torch.save(state, aside / STATE_FILE)
            checksums = {path.name: _sha256(path) for path in sorted(aside.iterdir())}
            record = {"step": step, "run": run, "arguments": arguments, "sha256": checksums}
            (aside / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n")
    except (OSError, RuntimeError, SafetensorError) as error:
        if former is not None:
            os.rename(former, directory)
        raise disk_error("the checkpoint", directory, error) from error
    if former is not None:
        _put_away(former, directory, run)
    earlier = [path for number, path in list_checkpoints(folder) if number <= step and _is_of(path, run)]
    for path in earlier[:-keep]:
        shutil.rmtree(_hide(path))
    return directory


def find_checkpoint(
    resume: str | None, folder: Path, arguments: dict[str, Any] | None, log: Callable[[str], None] = print
) -> Checkpoint | None:
    """The checkpoint to resume from, or None to start from the beginning.

    Args:
        resume: "latest", a checkpoint's directory, or None.
        folder: Where "latest" looks.
        arguments: Those of this run; None: it does not matter whose it is.
        log: Told what is skipped, and where the run starts.

    Raises:
        FileNotFoundError: If `resume` is a path, and there is no checkpoint.
        ValueError: If the checkpoint at that path is damaged, or the run that wrote the checkpoint had other arguments.
    """
    if resume is None:
        return None
    found = _latest(folder, log) if resume == "latest" else _at(Path(resume), folder)
    if found is None:
        log(f"--resume latest: no checkpoint in {folder} yet, starting from the beginning")
        return None
    if arguments is None:
        return found
    check_arguments(found.arguments, arguments, found.directory)
    log(f"resuming from {found.directory}")
    if has_more_steps(found.arguments, arguments):
        log(
            f"it had {found.arguments[STEPS]} steps to do, now {arguments[STEPS]}: the learning rates fall over all of them"
        )
    return found


def check_arguments(saved: dict[str, Any], given: dict[str, Any], where: Path) -> None:
    """Refuse to resume what was begun with other arguments. More `--steps` than there were are no others.

    Raises:
        ValueError: Naming each argument that differs, the value given and the value saved.
    """
    given = json.loads(json.dumps(given))
    differing = [name for name in {**given, **saved} if given.get(name) != saved.get(name)]
    if has_more_steps(saved, given):
        differing.remove(STEPS)
    if differing:
        values = "; ".join(f"{name}: given {given.get(name)!r}, saved {saved.get(name)!r}" for name in differing)
        raise ValueError(f"{where} is of a run with other arguments. {values}")


def has_more_steps(saved: dict[str, Any], given: dict[str, Any]) -> bool:
    """Whether a run is to continue beyond its end."""
    return given.get(STEPS, 0) > saved.get(STEPS, math.inf)


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """``(step, directory)`` of all checkpoints, damaged ones included, by step."""
    found = [(re.fullmatch(r"step-(\d+)", path.name), path) for path in folder.glob("step-*")]
    return sorted((int(match[1]), path) for match, path in found if match)


def random_state() -> dict[str, Any]:
    """The states of all random number generators of this process, as tensors, numbers and tuples of them."""
    name, keys, *rest = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Bring all generators back to where they were when [`random_state`] was called."""
    torch.set_rng_state(state["torch"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _latest(folder: Path, log: Callable[[str], None]) -> Checkpoint | None:
    for _, directory in reversed(list_checkpoints(folder)):
        try:
            return _read(directory)
        except ValueError as error:
            log(f"skipping a damaged checkpoint: {error}")
    return None


def _at(directory: Path, folder: Path) -> Checkpoint:
    if not (directory / RECORD_FILE).is_file():
        known = [str(path) for _, path in list_checkpoints(folder)]
        there = f"those of this run are {known}" if known else f"there is none in {folder}"
        raise FileNotFoundError(f"--resume {directory} is no checkpoint, it has no file {RECORD_FILE}; {there}")
    return _read(directory)


def _read(directory: Path) -> Checkpoint:
    """Check every file of a checkpoint against its checksum; ValueError names the first that is wrong."""
    path = directory / RECORD_FILE
    try:
        record = json.loads(path.read_text())
        step, arguments, checksums = record["step"], record["arguments"], dict(record["sha256"])
        run = record.get("run")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error!r}") from error
    for name in (WEIGHTS_FILE, STATE_FILE, *checksums):
        if not (directory / name).is_file():
            raise ValueError(f"{directory / name} is missing")
        if _sha256(directory / name) != checksums.get(name):
            raise ValueError(f"{directory / name} is not what was written (its checksum differs)")
    return Checkpoint(directory, step, arguments, run)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _is_of(directory: Path, run: str | None) -> bool:
    try:
        return json.loads((directory / RECORD_FILE).read_text()).get("run") == run
    except (OSError, ValueError, AttributeError):
        return False


def _hide(directory: Path) -> Path:
    """Give a checkpoint a name that nothing reads: whoever is killed later leaves it there."""
    hidden = directory.with_name(f".{directory.name}-hidden")
    os.rename(directory, hidden)
    return hidden


def _put_away(former: Path, directory: Path, run: str | None) -> None:
    """Remove what lay at a checkpoint's place where it was this run's, else keep it beside it."""
    if _is_of(former, run):
        shutil.rmtree(former)
        return
    names = (directory.with_name(f"{directory.name}.old-{number}") for number in range(1, 10**6))
    os.rename(former, next(name for name in names if not name.exists()))


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed saves and removals left."""
    for path in folder.glob(".step-*"):
        if re.fullmatch(r"\.step-\d+-([0-9a-f]{32}|[a-z0-9_]{8}|hidden)", path.name):
            shutil.rmtree(path)
