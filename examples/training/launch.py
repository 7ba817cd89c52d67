"""accelerate, as the training script needs it."""

from __future__ import annotations

import argparse
import os

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import DistributedType, GradientAccumulationPlugin


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """accelerate with what the options say.

    Raises:
        NotImplementedError: Its configuration splits the weights over processes.
    """
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        # every step has the same number of batches, also where an epoch ends
        gradient_accumulation_plugin=GradientAccumulationPlugin(args.grad_accumulation, sync_with_dataloader=False),
        # padding the last batch would count its images twice in the metrics
        dataloader_config=DataLoaderConfiguration(even_batches=False),
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=args.output_dir,
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise NotImplementedError(
            f"{accelerator.distributed_type.value} splits the weights over the processes, and this script saves whole ones: "
            "choose plain data parallelism in accelerate's configuration; an adapter is small, and so is its optimiser"
        )
    return accelerator


def set_threads(accelerator: Accelerator, number: int | None) -> None:
    """accelerate launch leaves a process one CPU thread unless it is told `--cpu`: give it its share of the cores."""
    if number is None and "ACCELERATE_MIXED_PRECISION" in os.environ and accelerator.device.type == "cpu":
        number = max(1, os.cpu_count() // accelerator.num_processes)
    if number is not None:
        torch.set_num_threads(number)
