"""What is compared: methods, amounts of data, and the runs of the training script that each of them needs."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from train_multitask import ADAPTER_LR, parse_args
from transformers import SamVisionModel

import peft_talora as pt
from peft_talora.msam.loading import load_sam

from .jobs import Job

# what the training script does unless it is told otherwise
DEFAULTS = parse_args([])
# the learning rates that are tried, of every method: its default times these
RATE_FACTORS = (0.4, 1.0, 2.5)


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        label: What it is called there.
        method: `--method` of the training script.
        rate_options: The options that get the learning rate that is chosen for it.
        per_task: A model for each task instead of one for all.
    """

    label: str
    method: str
    rate_options: tuple[str, ...] = ("--lr",)
    per_task: bool = False

    @property
    def rates(self) -> list[float]:
        """The learning rates that are tried."""
        default = DEFAULTS.decoder_lr if self.method == "decoder" else ADAPTER_LR[self.method]
        return [float(f"{factor * default:.2g}") for factor in RATE_FACTORS]

    @property
    def default_rate(self) -> float:
        return self.rates[RATE_FACTORS.index(1.0)]


BASELINE = "decoder"
METHODS = {
    BASELINE: Method("decoders only", "decoder", ("--decoder-lr",)),
    "lora": Method("PEFT LoRA, shared by the tasks", "lora"),
    "lora_per_task": Method("PEFT LoRA, one per task", "lora", per_task=True),
    "talora": Method("TA-LoRA", "talora"),
    "convlora": Method("Conv-LoRA", "convlora"),
    # it trains the encoder's norms with the rest
    "full": Method("everything", "full", ("--lr", "--norm-lr")),
}


@dataclass(frozen=True)
class Amount:
    """How much labelled data there is."""

    images: int
    one_task_each: bool = False

    def __str__(self) -> str:
        return f"{self.images} images" + (", each labelled for one task" if self.one_task_each else "")


@dataclass(frozen=True)
class Entry:
    """A method as `--methods` names it: "talora", or "talora:8" with a rank of its own."""

    name: str
    rank: int | None = None

    @classmethod
    def parse(cls, text: str) -> Entry:
        name, colon, rank = text.partition(":")
        if name not in METHODS:
            raise argparse.ArgumentTypeError(f"unknown method {name!r}, expected one of {list(METHODS)}")
        if colon and not (rank.isdigit() and int(rank) > 0):
            raise argparse.ArgumentTypeError(f"{text!r}: expected METHOD or METHOD:RANK with a rank of at least 1")
        return cls(name, int(rank) if colon else None)

    @property
    def method(self) -> Method:
        return METHODS[self.name]

    @property
    def label(self) -> str:
        return self.method.label + ("" if self.rank is None else f", r={self.rank}")

    def __str__(self) -> str:
        return self.name if self.rank is None else f"{self.name}-{self.rank}"


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

    def jobs(
        self, entry: Entry, rates: Mapping[str, float], amount: Amount, seed: int, split: str = "test"
    ) -> dict[str, Job]:
        """The runs that one number of the table needs: {what they train: run}.

        `rates` has the learning rate of the method, and the decoders', which all methods share.
        """
        options = ["--method", entry.method.method, "--seed", str(seed), "--num-train", str(amount.images),
                   "--evaluate-on", split, *self.common]  # fmt: skip
        decoder_rate = rates.get(BASELINE, DEFAULTS.decoder_lr)
        named = {"--decoder-lr": decoder_rate} | dict.fromkeys(entry.method.rate_options, rates[entry.name])
        options += [word for option, rate in named.items() for word in (option, str(rate))]
        rank = entry.rank or self.ranks.get(entry.name)
        if rank is not None:
            options += ["--rank", str(rank)]
        if amount.one_task_each:
            options += ["--one-task-each", *self.tasks]
            if not entry.method.per_task:
                # as many labelled images of every task, and as many encoder passes, as where each has a model
                options += ["--steps", str(len(self.tasks) * self.steps)]
        parts = [f"{amount.images}{'-one-task-each' if amount.one_task_each else ''}-{split}", str(entry),
                 f"rate-{rates[entry.name]:g}", f"seed-{seed}"]  # fmt: skip
        folder = self.output_dir.joinpath("runs", *parts)
        if not entry.method.per_task:
            return {"all": Job(folder, (*options, "--tasks", *self.tasks))}
        return {task: Job(folder / task, (*options, "--tasks", task)) for task in self.tasks}


def matching_ranks(base: str, rank: int, tasks: tuple[str, ...]) -> dict[str, int]:
    """{method: rank}: TA-LoRA's, and the LoRAs' that have as many parameters as TA-LoRA, together where one is per task."""
    config = load_sam(base).config.vision_config

    def parameters(adapter: pt.TALoraConfig | LoraConfig) -> int:
        with torch.device("meta"):
            model = get_peft_model(SamVisionModel(config), adapter)
        return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

    share = parameters(pt.TALoraConfig(tasks=list(tasks), r=rank)) / parameters(
        LoraConfig(r=1, target_modules=["qkv"])
    )
    return {
        "talora": rank,
        "lora": max(1, round(share)),
        "lora_per_task": max(1, round(share / len(tasks))),
    }
