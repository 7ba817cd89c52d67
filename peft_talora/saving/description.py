"""What the files of a saved mSAM adapter are called, and what their JSON says."""

from __future__ import annotations

import json
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from ..msam.tasks import parse_tasks
from .seal import SEAL, check_format, has_seal, read_json

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
# what mSAM needs, beside an adapter whose configuration has no field for it (PEFT's own tuners)
MSAM_FILE = "msam.json"
MSAM_FIELDS = ("tasks", "channel_mode", "image_size")


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON object as the other files of an adapter are written."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_config(directory: Path) -> PeftConfig:
    """The adapter's configuration, whatever its checksum says.

    Raises:
        ValueError: It cannot be read, or a newer version of this package saved it. The message names the file.
    """
    file = directory / CONFIG_FILE
    check_format(file)
    peft_type = read_json(file).get("peft_type")
    if not isinstance(peft_type, str) or peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(f"{file} cannot be read: PEFT knows no peft_type {peft_type!r}.")
    try:
        # PeftConfig's own method, not that of the tuner's class, which checks the seal
        return PeftConfig.from_pretrained(directory)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def read_msam_fields(directory: Path, config: PeftConfig, verify: bool = True) -> tuple[dict[str, Any], Path]:
    """What the adapter says about its mSAM, and the file that says so and has the seal.

    Args:
        directory: The adapter.
        config: Its configuration.
        verify: Refuse entries that nobody knows in a file without a seal: they may be a damaged seal.

    Raises:
        ValueError: The adapter is not one of an mSAM, or what it says is not complete. The message names the file.
    """
    fields, file = getattr(config, "msam", None), directory / CONFIG_FILE
    known = {field.name for field in dataclass_fields(config)}
    if fields is None and (directory / MSAM_FILE).is_file():
        file = directory / MSAM_FILE
        check_format(file)
        fields, known = read_json(file), {*MSAM_FIELDS, "base", SEAL}
    if fields is None:
        raise ValueError(
            f"'{directory}' is an adapter, but not one of an MSamForMultiTask: neither its {CONFIG_FILE} has a field "
            f"`msam` nor is there a {MSAM_FILE}. Load it with PeftModel.from_pretrained."
        )
    unknown = sorted(read_json(file).keys() - known)
    if verify and unknown and not has_seal(file):
        raise ValueError(f"{file} has unknown entries {unknown}, and no checksum that says they belong there.")
    _check_fields(fields, file, getattr(config, "tasks", None))
    return fields, file


def _check_fields(fields: Any, file: Path, tasks: list[str] | None) -> None:
    missing = [name for name in MSAM_FIELDS if not isinstance(fields, dict) or name not in fields]
    if missing:
        raise ValueError(f"{file} does not say the {missing} of the MSamForMultiTask.")
    try:
        names = list(parse_tasks(fields["tasks"]))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} has no tasks that can be read: {error}") from error
    if tasks is not None and tasks != names:
        raise ValueError(f"{file} contradicts itself: its tasks are {tasks}, those of its mSAM {names}.")
