"""What travels with a saved adapter's configuration: its format, and a checksum of the weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
SEAL = "saved_by"
PACKAGE = "peft_talora"
# raised when older versions of this package would misread what newer ones save
FORMAT = 1
# plain PEFT only says "KeyError: 'TALORA'"
NOTE = "PEFT knows this adapter after `import peft_talora`; one of an mSAM is loaded by MSamForMultiTask.from_adapter."
# configurations are a few thousand bytes
MAX_JSON_BYTES = 10_000_000


def seal(path: Path, settings: Mapping[str, Any] | None = None, weights: Path | None = None) -> None:
    """Write the entry `saved_by` into a JSON file: package, format, a note for whoever opens it, and what is given.

    The values of the file itself have no checksum: they may be changed by hand, as far as they fit the weights.

    Args:
        path: A JSON object; an entry that it has already is completed.
        settings: What the weights mean, see `saving.settings`.
        weights: The weights' file beside it, for its sha256.
    """
    values = read_json(path)
    entry = {**(values.get(SEAL) or {}), "package": PACKAGE, "format": FORMAT, "note": NOTE}
    if settings is not None:
        entry["settings"] = dict(settings)
    if weights is not None:
        entry["sha256"] = {weights.name: sha256(weights.read_bytes())}
    path.write_text(json.dumps({**values, SEAL: entry}, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: It is none; the message names the file.
    """
    return parse_json(path.read_bytes(), path)


def parse_json(content: bytes, path: Path) -> dict[str, Any]:
    """The JSON object that a file holds, of a format that is known.

    Args:
        content: The file's bytes.
        path: For messages.

    Raises:
        ValueError: It is none, or of a newer version of this package; the message names the file.
    """
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"{path} cannot be read: it has {len(content):,} bytes, a configuration has a few thousand.")
    try:
        values = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} cannot be read: it holds a {type(values).__name__}, not a JSON object.")
    check_format(values, path)
    return values


def check_format(values: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError where a newer version of this package wrote the values of a JSON file."""
    entry = values.get(SEAL)
    version = entry.get("format") if isinstance(entry, dict) else None
    if isinstance(version, int) and version > FORMAT:
        raise ValueError(
            f"{path} was saved in format {version}, by a newer version of {PACKAGE}; this one reads formats up to "
            f"{FORMAT}. Upgrade {PACKAGE}."
        )


def sha256(content: bytes) -> str:
    """The checksum as the files hold it."""
    return hashlib.sha256(content).hexdigest()


def has_weights(values: Mapping[str, Any], content: bytes) -> bool:
    """Whether a configuration was saved with these weights, as far as it says so.

    Args:
        values: The configuration.
        content: The bytes of the weights' file.
    """
    entry = values.get(SEAL)
    checksums = entry.get("sha256") if isinstance(entry, dict) else None
    expected = checksums.get(WEIGHTS_FILE) if isinstance(checksums, dict) else None
    return expected is None or expected == sha256(content)


def check_sound(is_sound: bool, path: Path) -> None:
    """Raise ValueError, which names the weights' file, unless its weights are as they were saved."""
    if not is_sound:
        raise ValueError(
            f"{path} is not as it was saved: its sha256 is not the one that the configuration beside it has. It was damaged, "
            f"or changed by hand. If that was on purpose, load it with MSamForMultiTask.from_adapter(..., verify=False), "
            f"or remove the entry `{SEAL}` from the configuration."
        )
