"""Which layers get an adapter; an adapter to start from, or to evaluate."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from math import isfinite
from typing import Any

from peft import LoraConfig, PeftConfig, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

import peft_talora as pt
from peft_talora.data.detection import UnlabelledTask
from peft_talora.talora.init import COMMON_SHARE

from .data import Data, weigh
from .options import ADAPTER_LR, DECIDED, RANK

# where TA-LoRA starts here: half of its ranks are one LoRA for all tasks, the others are dealt out to them. With this scaling a step
# moves the weights of three tasks about as far as a shared LoRA's with as many parameters (CONTRIBUTING has the numbers)
START = {"init_weights": "half", "scaling": 1.4}
# fields of configurations that no --config chooses
OF_THE_SCRIPT = {*DECIDED, "modules_to_save", "msam", "saved_by", "active_task", "added_tasks", "layers_pattern"}


def adapted_layers(encoder: nn.Module, targets: str, layers: str) -> dict[str, Any]:
    """What a configuration of PEFT needs to know of --targets and --layers.

    Args:
        encoder: The vision encoder; its blocks are `layers`.
        targets: "qkv", or "all": all of its linear layers.
        layers: "all"; "last-half"; or "shared-half", of TA-LoRA: all, and the first half has one update for all tasks. What the
            first half gives is the same for all tasks in both, so that it runs once for all of them.
    """
    names = {name.rpartition(".")[2] for name, module in encoder.named_modules() if isinstance(module, nn.Linear)}
    blocks = len(getattr(encoder, "blocks", None) or encoder.layers)
    first_half, last_half = list(range(blocks // 2)), list(range(blocks // 2, blocks))
    of_layers = {"last-half": {"layers_to_transform": last_half}, "shared-half": {"shared_layers": first_half}}
    fused = [name for name in names if name == "qkv"]
    return {
        # as the tuners' defaults: SAM 3 has no fused projection
        "target_modules": sorted(names) if targets == "all" else fused or ["q_proj", "v_proj"],
        **of_layers.get(layers, {}),
    }


def adapter_config(method: str, rank: int, chosen: Mapping[str, Any], tasks: Sequence[str], **more: Any) -> PeftConfig:
    """The configuration of a method.

    Args:
        method: "talora", "convlora" or "lora".
        rank: Its rank.
        chosen: The fields of --config.
        tasks: The tasks' names, for TA-LoRA.
        more: Further fields, which --config does not choose.

    Raises:
        ValueError: It has no such field, or a value does not fit.
    """
    kinds: dict[str, type[PeftConfig]] = {"talora": pt.TALoraConfig, "convlora": pt.ConvLoraConfig, "lora": LoraConfig}
    kind = kinds[method]
    for name, value in chosen.items():
        check_field(kind, name, value)
    own: dict[str, Any] = {}
    if method == "lora":
        # with alpha = r PEFT's LoRA is not scaled, whatever its rank
        own["lora_alpha"] = rank
    elif method == "talora":
        own["tasks"] = list(tasks)
        own.update(start_fields(method, chosen))
        if {**own, **chosen}["init_weights"] in COMMON_SHARE:
            # a slice of G for all tasks and one for each; the published number at least
            own["r_task"] = max(4, len(tasks) + 1)
    return kind(r=rank, **{**own, **more, **chosen})


def start_fields(method: str, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """What the script chooses of TA-LoRA's start beside the fields of --config: nothing where these name another one."""
    if method != "talora" or chosen.get("init_weights", START["init_weights"]) != START["init_weights"]:
        return {}
    return {name: value for name, value in START.items() if name not in chosen}


def check_field(kind: type[PeftConfig], name: str, value: Any) -> None:
    """Raise ValueError unless a configuration has a field of this name to choose, and takes the value for its type."""
    # what is PEFT's own or the script's is no choice
    peft = {field.name for field in fields(PeftConfig)}
    known = {field.name: field for field in fields(kind) if field.name not in peft | OF_THE_SCRIPT}
    given = f"--config {name}={value}: {kind.__name__}"
    if name not in known:
        close = get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(sorted(known))}"
        raise ValueError(f"{given} has no such field to choose; {hint}")
    # PEFT's own take any value
    sort = getattr(known[name].type, "__name__", known[name].type)
    if sort == "bool" and not isinstance(value, bool):
        raise ValueError(f"{given} expects True or False there")
    if sort in ("int", "float") and (
        isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value)
    ):
        raise ValueError(f"{given} expects a number there")


def check_config(method: str, rank: int, chosen: Mapping[str, Any]) -> None:
    """Raise ValueError unless an adapter can be made with the fields of --config: on one small layer."""
    config = adapter_config(method, rank, chosen, tasks=["task"], target_modules=["qkv"])
    # indices of the model's own layers, of which that one is none
    config.shared_layers = None
    try:
        get_peft_model(nn.ModuleDict({"qkv": nn.Linear(6, 18)}), config)
    except Exception as error:
        named = " ".join(f"{name}={value}" for name, value in chosen.items())
        raise ValueError(f"--config {named}: {error}") from error


def load_adapter(args: argparse.Namespace):
    """The PeftModel of --init-from; the options that it decides are set to what it says."""
    model = pt.MSamForMultiTask.from_adapter(args.init_from, base_model=args.base, is_trainable=not args.eval_only)
    config, msam = model.peft_config[model.active_adapter], model.get_base_model()
    args.method = {"TALORA": "talora", "CONVLORA": "convlora"}.get(config.peft_type.value, "lora")
    if config.target_modules == DUMMY_TARGET_MODULES:
        args.method = "full" if "vision_encoder" in config.modules_to_save else "decoder"
    args.rank = config.r if args.method in RANK else None
    args.lr = ADAPTER_LR.get(args.method) if args.lr is None else args.lr
    # in the adapter's configuration, and not always one of the choices here
    args.targets = args.layers = None
    args.base, args.channel_mode = msam.name_or_path, msam.config.channel_mode
    args.image_size = msam.config.image_size
    return model


def adapter_data(args: argparse.Namespace, model, load: Callable[..., Data]) -> Data:
    """Data for an adapter that exists: its tasks, and labels that fit them."""
    specs = model.get_base_model().task_specs
    cure = "for other tasks train without --init-from; peft_talora.add_task adds a new one to an adapter, in Python"
    if args.tasks is not None and args.tasks != list(specs):
        raise ValueError(
            f"--tasks: {args.init_from} is an adapter for {list(specs)}, got {args.tasks}: leave --tasks out, or say "
            f"--tasks {' '.join(specs)}; {cure}"
        )
    try:
        data = load(args, args.image_size, list(specs))
    except UnlabelledTask as error:
        raise ValueError(
            f"{error}; {args.init_from} is an adapter for {list(specs)} and needs labels of all of them: {cure}"
        ) from error
    for name, spec in data.tasks.items():
        if spec.kind != specs[name].kind or spec.num_channels > specs[name].num_channels:
            raise ValueError(
                f"task {name!r} is {spec.kind} with {spec.num_channels} channels in {args.dataset}, in {args.init_from} it is "
                f"{specs[name].kind} with {specs[name].num_channels}"
            )
        given, own = spec.class_names or [], specs[name].class_names or []
        if given and own and given != own[: len(given)]:
            raise ValueError(
                f"task {name!r} has the classes {given} in {args.dataset}, in {args.init_from} they are {own}: the same number means "
                "another class. `class_names` in the adapter's order, and `class_map` from the files' numbers to it, cure it"
            )
    weigh(specs, args.task_weights)
    return replace(data, tasks=specs)
