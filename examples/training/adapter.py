"""Which layers get an adapter; an adapter to start from, or to evaluate."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

import peft_talora as pt
from peft_talora.data.detection import UnlabelledTask

from .data import Data, weigh
from .options import ADAPTER_LR, RANK


def adapted_layers(encoder: nn.Module, targets: str, layers: str) -> dict[str, Any]:
    """What a configuration of PEFT needs to know of --targets and --layers.

    Args:
        encoder: The vision encoder; its blocks are `layers`.
        targets: "qkv", or "all": all of its linear layers.
        layers: "all", or "last-half": what comes before is the same for all tasks, and runs once for all of them.
    """
    names = {name.rpartition(".")[2] for name, module in encoder.named_modules() if isinstance(module, nn.Linear)}
    blocks = len(getattr(encoder, "blocks", None) or encoder.layers)
    fused = [name for name in names if name == "qkv"]
    return {
        # as the tuners' defaults: SAM 3 has no fused projection
        "target_modules": sorted(names) if targets == "all" else fused or ["q_proj", "v_proj"],
        "layers_to_transform": list(range(blocks // 2, blocks)) if layers == "last-half" else None,
    }


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
    weigh(specs, args.task_weights)
    return replace(data, tasks=specs)
