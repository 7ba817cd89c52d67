"""Saved adapters that several tests of the examples load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from peft import get_peft_model
from small_models import move_saved_modules

from peft_talora import MSamForMultiTask, TALoraConfig, TaskSpec, save_adapter


def make_adapter(base: str, directory: Path, tasks: Mapping[str, TaskSpec]) -> str:
    """Save an adapter whose decoders were moved at random; the directory."""
    msam = MSamForMultiTask.from_sam(base, tasks, channel_mode="token")
    save_adapter(move_saved_modules(get_peft_model(msam, TALoraConfig(r=4))), directory)
    return str(directory)
