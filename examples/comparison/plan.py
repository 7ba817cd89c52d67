"""What is compared: amounts of data, and the runs of the training script that each method needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from peft import get_peft_model
from torch import nn
from training.adapter import adapted_layers, adapter_config, check_config, start_fields
from training.options import RANK
from transformers import PreTrainedModel

from peft_talora.msam.families import family_of_model
from peft_talora.msam.loading import load_sam

from .jobs import Job
from .methods import BASELINE, DEFAULTS, METHODS, Entry, Method


@dataclass(frozen=True)
class Amount:
    """How much labelled data there is."""

    images: int
    one_task_each: bool = False

    def __str__(self) -> str:
        return f"{self.images} images" + (", each labelled for one task" if self.one_task_each else "")


@dataclass(frozen=True)
class Cell:
    """One number of a table.

    Attributes:
        entry: The method.
        amount: The data.
        seed: The seed.
        split: The split that is evaluated.
        threads: CPU threads, where it is a repetition with another number of them.
    """

    entry: Entry
    amount: Amount
    seed: int
    split: str = "test"
    threads: int | None = None

    @property
    def baseline(self) -> Cell:
        """What it is compared with: the decoders alone, all else the same."""
        return replace(self, entry=Entry(BASELINE))


@dataclass(frozen=True)
class Plan:
    """What all runs have in common.

    Attributes:
        output_dir: Where the runs go.
        tasks: The tasks.
        ranks: {method: rank} of those that have no rank of their own.
        common: Further arguments of the training script.
        steps: Its steps.
    """

    output_dir: Path
    tasks: tuple[str, ...]
    ranks: Mapping[str, int]
    common: tuple[str, ...] = ()
    steps: int = DEFAULTS.steps

    def jobs(self, cell: Cell, rates: Mapping[str, float]) -> dict[str, Job]:
        """The runs that one number of the table needs: {what they train: run}.

        `rates` has the learning rate of the line, and the decoders', which all methods share.
        """
        entry, amount, threads = cell.entry, cell.amount, cell.threads
        own_rate = rates[str(entry.line)]
        options = [*entry.options, "--seed", str(cell.seed), "--num-train", str(amount.images),
                   "--evaluate-on", cell.split, *self.common]  # fmt: skip
        decoder_rate = rates.get(BASELINE, DEFAULTS.decoder_lr)
        named = {"--decoder-lr": decoder_rate} | dict.fromkeys(entry.method.rate_options, own_rate)
        options += [word for name, rate in named.items() for word in (name, str(rate))]
        rank = entry.rank or self.ranks.get(entry.name)
        if rank is not None:
            options += ["--rank", str(rank)]
        # said, so that a run with another start of the script's is another one
        start = start_fields(entry.method.method, entry.config)
        fields = [*(f"{name}={value}" for name, value in start.items()), *entry.fields]
        if fields:
            options += ["--config", *fields]
        if amount.one_task_each:
            options += ["--one-task-each", *self.tasks]
            if not entry.method.per_task:
                # as many labelled images of every task, and as many encoder passes, as where each has a model
                options += ["--steps", str(len(self.tasks) * self.steps)]
        parts = [f"{amount.images}{'-one-task-each' if amount.one_task_each else ''}-{cell.split}", str(entry),
                 f"rate-{own_rate:g}", f"seed-{cell.seed}" + (f"-threads-{threads}" if threads else "")]  # fmt: skip
        folder = self.output_dir.joinpath("runs", *parts)
        if not entry.method.per_task:
            return {"all": Job(folder, (*options, "--tasks", *self.tasks), threads)}
        return {task: Job(folder / task, (*options, "--tasks", task), threads) for task in self.tasks}


def check_fields(entries: Iterable[Entry]) -> None:
    """Raise ValueError where a row has fields of its own that its configuration does not take, before any run."""
    for entry in entries:
        if entry.fields:
            check_config(entry.method.method, entry.rank or 1, entry.config)


def matching_ranks(base: str, rank: int, tasks: tuple[str, ...], names: Iterable[str] = METHODS) -> dict[str, int]:
    """{method: rank} at which each has about as many parameters as TA-LoRA of `rank` on every qkv with no layer shared; one per task, all together."""
    sam = load_sam(base)
    target = count_parameters(sam, METHODS["talora_unshared"], tasks, rank)
    ranks = {}
    for name in names:
        method = METHODS[name]
        if method.method in RANK:
            ranks[name] = RANK[method.method] if method.published_rank else nearest_rank(sam, method, tasks, target)
    return ranks


def nearest_rank(sam: PreTrainedModel, method: Method, tasks: tuple[str, ...], target: int) -> int:
    """The rank at which a method has most nearly as many parameters: their number is a quadratic function of it."""
    # with fewer some tasks start without a rank of their own, of which a configuration warns
    few = [len(tasks) + more for more in (1, 2, 3)]
    polynomial = np.polyfit(few, [count_parameters(sam, method, tasks, rank) for rank in few], 2)
    high = 1
    while np.polyval(polynomial, high) < target:
        high *= 2
    ranks = np.arange(1, high + 1)
    return int(ranks[np.abs(np.polyval(polynomial, ranks) - target).argmin()])


def count_parameters(sam: PreTrainedModel, method: Method, tasks: tuple[str, ...], rank: int) -> int:
    """How many parameters a method's adapters of this rank have, without the decoders and norms."""
    with torch.device("meta"):
        encoder = family_of_model(sam).encoder_class(sam.config.vision_config)
        where = adapted_layers(encoder, method.targets, method.layers)
        adapter = adapter_config(method.method, rank, {}, tasks, **where)
        # under the name that it has in a SAM: PEFT finds the layers' numbers behind a name
        model = get_peft_model(nn.ModuleDict({"vision_encoder": encoder}), adapter)
    number = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return number * (len(tasks) if method.per_task else 1)
