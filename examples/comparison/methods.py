"""The methods that are compared, and how a command line names them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from training.options import ADAPTER_LR, RANK, config_field, parse_args, repeated

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
    "talora": Method("TA-LoRA", "talora", targets="all", layers="shared-half"),
    "convlora": Method(f"Conv-LoRA, r={RANK['convlora']}", "convlora", published_rank=True),
    # it trains the encoder's norms with the rest
    "full": Method("everything", "full", ("--lr", "--norm-lr")),
    "convlora_equal": Method("Conv-LoRA", "convlora"),
    "talora_qkv": Method("TA-LoRA, every qkv", "talora", layers="shared-half"),
    "talora_unshared": Method("TA-LoRA, every qkv, no layer shared", "talora"),
    "talora_last_half": Method("TA-LoRA, every qkv of the last half of the layers", "talora", layers="last-half"),
    "talora_all_unshared": Method("TA-LoRA, no layer shared", "talora", targets="all"),
    "lora_all": Method("PEFT LoRA, shared, all linear layers", "lora", targets="all"),
    "lora_per_task_all": Method("PEFT LoRA, one per task, all linear layers", "lora", per_task=True, targets="all"),
    "convlora_all": Method("Conv-LoRA, all linear layers", "convlora", targets="all"),
}


# the rows without --methods
ROWS = ("decoder", "lora", "lora_per_task", "lora_all", "talora", "convlora", "full")


@dataclass(frozen=True)
class Entry:
    """A method as `--methods` names it: "talora", "talora:8" with a rank, "talora:scaling=1" with a field of its own.

    Attributes:
        name: The method's name.
        rank: Its rank; None for the one that is chosen for it.
        fields: Further fields of its configuration, as the training script's --config takes them.
    """

    name: str
    rank: int | None = None
    fields: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Entry:
        name, *parts = text.split(":")
        if name not in METHODS:
            raise argparse.ArgumentTypeError(f"unknown method {name!r}, expected one of {list(METHODS)}")
        rank = int(parts.pop(0)) if parts and parts[0].isdecimal() else None
        if rank == 0 or any(not re.fullmatch(r"(?!r=)\w+=[^/\\\s]+", part) for part in parts):
            raise argparse.ArgumentTypeError(
                f"{text!r}: expected METHOD, METHOD:RANK with a rank of at least 1, or METHOD:FIELD=VALUE"
            )
        if METHODS[name].method not in RANK and (rank or parts):
            raise argparse.ArgumentTypeError(f"{text!r}: {name} has no adapter, and so no rank and no fields")
        names = [config_field(part)[0] for part in parts]
        twice = repeated(names)
        if twice is not None:
            raise argparse.ArgumentTypeError(f"{text!r}: {twice} is there twice")
        if "shared_layers" in names and METHODS[name].layers == "last-half":
            raise argparse.ArgumentTypeError(
                f"{text!r}: {name} says itself which layers have an update, take talora_qkv"
            )
        return cls(name, rank, tuple(parts))

    @property
    def method(self) -> Method:
        return METHODS[self.name]

    @property
    def config(self) -> dict[str, Any]:
        """{field: value} of its own fields."""
        return dict(map(config_field, self.fields))

    @property
    def options(self) -> tuple[str, ...]:
        """Options of the training script that say what the method is, without its rank and fields."""
        method = self.method
        if method.method not in RANK:
            return ("--method", method.method)
        # a field that names the shared layers says what --layers does
        layers = () if "shared_layers" in self.config else ("--layers", method.layers)
        return ("--method", method.method, "--targets", method.targets, *layers)

    @property
    def line(self) -> Entry:
        """The method with these fields, of whatever rank: what has one learning rate, and is one line of a plot."""
        return replace(self, rank=None)

    @property
    def label(self) -> str:
        rank = () if self.rank is None else (f"r={self.rank}",)
        return ", ".join((self.method.label, *rank, *self.fields))

    def __str__(self) -> str:
        rank = () if self.rank is None else (str(self.rank),)
        return "-".join((self.name, *rank, *self.fields))


def default_rates(lines: Iterable[Entry]) -> dict[str, float]:
    """{line: the learning rate that counts unless another is chosen}."""
    return {str(line): line.method.default_rate for line in lines}
