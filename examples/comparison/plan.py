"""What is compared: methods, amounts of data, and the runs of the training script that each of them needs."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from training.adapter import adapted_layers
from training.options import ADAPTER_LR, RANK, given_options, make_parser, option, parse_args
from transformers import PreTrainedModel

import peft_talora as pt
from peft_talora.msam.families import family_of_model
from peft_talora.msam.loading import load_sam

from . import one_run
from .jobs import Job

# what the training script does unless it is told otherwise
SCRIPT = "compare.py"
DEFAULTS = parse_args([])
# the learning rates that are tried, of every method: its default times these
RATE_FACTORS = (0.4, 1.0, 2.5)
# options of the training script that a comparison varies, or decides itself
VARIED = ("method", "seed", "lr", "decoder_lr", "rank", "targets", "layers", "max_train_images", "evaluate_on", "one_task_each", "baseline", "resume",
          "output_dir", "overwrite", "checkpoint_every", "keep_checkpoints", "init_from", "eval_only", "push_to_hub",
          "num_threads")  # fmt: skip
# options that only one method has
OF_A_METHOD = {"init_weights": "talora"}


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        label: What it is called there.
        method: `--method` of the training script.
        rate_options: The options that get the learning rate that is chosen for it.
        per_task: A model for each task instead of one for all.
        targets: `--targets` of it.
        layers: `--layers` of it.
        published_rank: It has the rank that it was published with, and not as many parameters as the others.
    """

    label: str
    method: str
    rate_options: tuple[str, ...] = ("--lr",)
    per_task: bool = False
    targets: str = "qkv"
    layers: str = "all"
    published_rank: bool = False

    @property
    def options(self) -> tuple[str, ...]:
        """Options of the training script that say what the method is."""
        where = ("--targets", self.targets, "--layers", self.layers) if self.method in RANK else ()
        return ("--method", self.method, *where)

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
    "convlora": Method(f"Conv-LoRA, r={RANK['convlora']}", "convlora", published_rank=True),
    # it trains the encoder's norms with the rest
    "full": Method("everything", "full", ("--lr", "--norm-lr")),
    "convlora_equal": Method("Conv-LoRA", "convlora"),
    "talora_last_half": Method("TA-LoRA, last half of the layers", "talora", layers="last-half"),
    "lora_all": Method("PEFT LoRA, shared, all linear layers", "lora", targets="all"),
    "lora_per_task_all": Method("PEFT LoRA, one per task, all linear layers", "lora", per_task=True, targets="all"),
    "talora_all": Method("TA-LoRA, all linear layers", "talora", targets="all"),
    "convlora_all": Method("Conv-LoRA, all linear layers", "convlora", targets="all"),
}
# the rows without --methods
ROWS = ("decoder", "lora", "lora_per_task", "talora", "convlora", "full")


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
        if colon and not (rank.isdecimal() and int(rank) > 0):
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


def check_common(arguments: Sequence[str]) -> argparse.Namespace:
    """The training script's options in what all runs have in common, however they are written.

    Raises:
        SystemExit: With code 2, after one line: one is wrong, or is what a comparison varies.
    """

    def make() -> argparse.ArgumentParser:
        parser = make_parser("", SCRIPT)
        parser.add_argument("--evaluate-on", choices=one_run.SPLITS)
        parser.add_argument("--one-task-each", nargs="+")
        return parser

    varied = [name for name in VARIED if name in given_options(make, arguments)]
    if varied:
        make().error(f"{option(varied[0])} is what this script varies or decides")
    return parse_args(arguments, prog=SCRIPT)


@dataclass(frozen=True)
class Plan:
    """What all runs have in common.

    Attributes:
        output_dir: Where the runs go.
        tasks: The tasks.
        ranks: {method: rank} of those that have no rank of their own.
        common: Further arguments of the training script.
        steps: Its steps.
        special: {method: arguments} that only one method takes.
    """

    output_dir: Path
    tasks: tuple[str, ...]
    ranks: Mapping[str, int]
    common: tuple[str, ...] = ()
    steps: int = DEFAULTS.steps
    special: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def jobs(self, cell: Cell, rates: Mapping[str, float]) -> dict[str, Job]:
        """The runs that one number of the table needs: {what they train: run}.

        `rates` has the learning rate of the method, and the decoders', which all methods share.
        """
        entry, amount, threads = cell.entry, cell.amount, cell.threads
        options = [*entry.method.options, "--seed", str(cell.seed), "--num-train", str(amount.images),
                   "--evaluate-on", cell.split, *self.common, *self.special.get(entry.method.method, ())]  # fmt: skip
        decoder_rate = rates.get(BASELINE, DEFAULTS.decoder_lr)
        named = {"--decoder-lr": decoder_rate} | dict.fromkeys(entry.method.rate_options, rates[entry.name])
        options += [word for name, rate in named.items() for word in (name, str(rate))]
        rank = entry.rank or self.ranks.get(entry.name)
        if rank is not None:
            options += ["--rank", str(rank)]
        if amount.one_task_each:
            options += ["--one-task-each", *self.tasks]
            if not entry.method.per_task:
                # as many labelled images of every task, and as many encoder passes, as where each has a model
                options += ["--steps", str(len(self.tasks) * self.steps)]
        parts = [f"{amount.images}{'-one-task-each' if amount.one_task_each else ''}-{cell.split}", str(entry),
                 f"rate-{rates[entry.name]:g}", f"seed-{cell.seed}" + (f"-threads-{threads}" if threads else "")]  # fmt: skip
        folder = self.output_dir.joinpath("runs", *parts)
        if not entry.method.per_task:
            return {"all": Job(folder, (*options, "--tasks", *self.tasks), threads)}
        return {task: Job(folder / task, (*options, "--tasks", task), threads) for task in self.tasks}


def split_common(
    arguments: Iterable[str], given: argparse.Namespace
) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """What all methods take of the common arguments, and {method: what only it takes}."""
    special: dict[str, tuple[str, ...]] = {}
    left = list(arguments)
    for name, method in OF_A_METHOD.items():
        value = getattr(given, name)
        if value is not None:
            special[method] = (option(name), value)
            left = without(left, option(name))
    return tuple(left), special


def without(arguments: Sequence[str], name: str) -> list[str]:
    """Arguments without an option of one value, written as `--name value`, `--name=value` or abbreviated."""
    left, skip = [], False
    for word in arguments:
        start, equals, _ = word.partition("=")
        # no other option begins like it where the parser took an abbreviation for it
        found = len(start) > 2 and start.startswith("--") and name.startswith(start)
        if not found and not skip:
            left.append(word)
        skip = found and not equals
    return left


def matching_ranks(base: str, rank: int, tasks: tuple[str, ...], names: Iterable[str] = METHODS) -> dict[str, int]:
    """{method: rank} at which each has about as many parameters as TA-LoRA of `rank`; one per task, all of them together."""
    sam = load_sam(base)
    target = count_parameters(sam, METHODS["talora"], tasks, rank)
    ranks = {}
    for name in names:
        method = METHODS[name]
        if method.method in RANK:
            ranks[name] = RANK[method.method] if method.published_rank else nearest_rank(sam, method, tasks, target)
    return ranks


def nearest_rank(sam: PreTrainedModel, method: Method, tasks: tuple[str, ...], target: int) -> int:
    """The rank at which a method has most nearly as many parameters: their number is a quadratic function of it."""
    few = (1, 2, 3)
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
        adapter = {
            "talora": lambda: pt.TALoraConfig(tasks=list(tasks), r=rank, init_weights=True, **where),
            "convlora": lambda: pt.ConvLoraConfig(r=rank, **where),
            "lora": lambda: LoraConfig(r=rank, **where),
        }[method.method]()
        # under the name that it has in a SAM: PEFT finds the layers' numbers behind a name
        model = get_peft_model(nn.ModuleDict({"vision_encoder": encoder}), adapter)
    number = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return number * (len(tasks) if method.per_task else 1)
