"""What an adapter's tensors mean beyond their shapes, kept among them: the order of the tasks, the scaling.

PEFT loads weights into an adapter that is there already without a look at the configuration beside them
(`load_adapter(path, "default")`, a Trainer that resumes). So the state dict of an adapter has one more entry: a tensor without
elements, whose name ends in JSON. It survives what is done to tensors, costs nothing, and any safetensors reader shows it;
transformers' own `load_adapter`, which reads the configuration too, reports it as unexpected.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, TypeVar
from urllib.parse import unquote

import torch

T = TypeVar("T")
PEFT_PREFIX = "base_model.model."
_ENTRY = re.compile(rf"(?:{re.escape(PEFT_PREFIX)})?settings:([^.]*)\..*")
# plain factors, which a configuration may change by hand; the others say which numbers stand for what
FACTORS = ("scaling", "convlora_alpha")


def with_settings(
    state: Mapping[str, torch.Tensor], settings: Mapping[str, Any], parameter: str
) -> dict[str, torch.Tensor]:
    """An adapter's state with its settings.

    Args:
        state: `{name: tensor}`.
        settings: What JSON can hold.
        parameter: The end of the entry's name: a parameter of the tuner as the other names have it, such as
            "talora_U3.default", from which PEFT takes the adapter's name.
    """
    if not state:
        return dict(state)
    front = PEFT_PREFIX if any(name.startswith(PEFT_PREFIX) for name in state) else ""
    # names are parted at dots
    text = json.dumps(settings, sort_keys=True).replace("%", "%25").replace(".", "%2E")
    return {**state, f"{front}settings:{text}.{parameter}": torch.empty(0)}


def split_settings(state: Mapping[str, T]) -> tuple[dict[str, T], dict[str, Any] | None]:
    """An adapter's state without its settings, and these; None where an older version saved it.

    Raises:
        ValueError: The settings are no JSON object.
    """
    tensors, settings = {}, None
    for name, value in state.items():
        entry = _ENTRY.fullmatch(name)
        if entry is None:
            tensors[name] = value
            continue
        try:
            settings = json.loads(unquote(entry[1]))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"The adapter's settings cannot be read from '{name}': {error}.") from error
        if not isinstance(settings, dict):
            raise ValueError(f"The adapter's settings cannot be read from '{name}': they are no JSON object.")
    return tensors, settings


def check_settings(saved: Mapping[str, Any] | None, current: Mapping[str, Any], on_file: Mapping[str, Any]) -> None:
    """Refuse weights that mean something else in the adapter that they are loaded into.

    Args:
        saved: The settings among the weights; None lets all pass.
        current: Those of the adapter.
        on_file: Those that the adapter's configuration had when it was saved, if it was read from a file: a factor may have
            been changed in it by hand since.

    Raises:
        ValueError: The message names both values.
    """
    for name, value in (saved or {}).items():
        if name not in current or current[name] == value or (name in FACTORS and on_file.get(name) == value):
            continue
        raise ValueError(
            f"The weights were saved with {name}={value!r}, the adapter that they are loaded into has {name}="
            f"{current[name]!r}: it would not mean the same. Make the adapter with their configuration, as "
            "PeftModel.from_pretrained does."
        )
