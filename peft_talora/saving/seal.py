"""What travels with a saved adapter so that damage is seen: its format, and checksums."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

SEAL = "saved_by"
PACKAGE = "peft_talora"
# raised when older versions of this package would misread what newer ones save
FORMAT = 1
# plain PEFT only says "KeyError: 'TALORA'"
NOTE = "PEFT knows this adapter after `import peft_talora`; one of an mSAM is loaded by MSamForMultiTask.from_adapter."
# where the base model lies may change, by hand too: the checksum leaves these entries out
UNSEALED = ("base_model_name_or_path", "revision")


def seal(path: Path, *others: Path) -> None:
    """Write the entry `saved_by` into a JSON file.

    It holds the package, the format's version, a note for whoever opens the file, and the sha256 of `path` and of
    `others`. A JSON file's is that of its values, whatever their order or the white space, without those of `UNSEALED`.

    Args:
        path: A JSON object; its former `saved_by` is replaced.
        others: Files beside it.
    """
    values = read_json(path)
    checksums = {other.name: _sha256(other) for other in others}
    values[SEAL] = {"package": PACKAGE, "format": FORMAT, "note": NOTE, "sha256": checksums}
    checksums[path.name] = _json_sha256(values, path.name)
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: It is none; the message names the file.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} cannot be read: it holds a {type(values).__name__}, not a JSON object.")
    return values


def check_format(path: Path) -> None:
    """Raise ValueError where a newer version of this package wrote the JSON file."""
    entry = read_json(path).get(SEAL)
    version = entry.get("format") if isinstance(entry, dict) else None
    if isinstance(version, int) and version > FORMAT:
        raise ValueError(
            f"{path} was saved in format {version}, by a newer version of {PACKAGE}; this one reads formats up to "
            f"{FORMAT}. Upgrade {PACKAGE}."
        )


def has_seal(path: Path) -> bool:
    """Whether the JSON file has a seal; those that older versions or others wrote have none."""
    return read_json(path).get(SEAL) is not None


def check_seal(path: Path, skip: Collection[str] = ()) -> None:
    """Compare a JSON file, and the files beside it that its seal names, with their checksums.

    A file without a seal passes, and so does one whose seal names files that are not there (yet).

    Args:
        path: The JSON file.
        skip: Names of files that are not looked at.

    Raises:
        ValueError: A file cannot be read, is not as it was saved, or is of a newer format. The message names it.
    """
    check_format(path)
    if not has_seal(path):
        return
    checksums = _checksums(path)
    for name, expected in checksums.items():
        file = path.parent / Path(name).name
        if name not in skip and file.is_file() and _sha256(file) != expected:
            raise ValueError(
                f"{file} is not as it was saved: its sha256 is not the one in {path.name}. It was damaged, or changed "
                f"by hand. If that was on purpose, load it with MSamForMultiTask.from_adapter(..., verify=False), or "
                f"remove the entry `{SEAL}` from {path.name}."
            )


def _checksums(path: Path) -> dict[str, str]:
    entry = read_json(path)[SEAL]
    checksums = entry.get("sha256") if isinstance(entry, dict) else None
    if not isinstance(checksums, dict) or path.name not in checksums:
        raise ValueError(f"{path} is damaged: its entry `{SEAL}` has no sha256 of {path.name}.")
    return checksums


def _sha256(path: Path) -> str:
    if path.suffix == ".json":
        return _json_sha256(read_json(path), path.name)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _json_sha256(values: dict[str, Any], name: str) -> str:
    """Of everything in the file `name` but its own checksum and what may change."""
    values = {key: value for key, value in values.items() if key not in UNSEALED}
    entry = values.get(SEAL)
    if isinstance(entry, dict) and isinstance(entry.get("sha256"), dict):
        others = {key: value for key, value in entry["sha256"].items() if key != name}
        values[SEAL] = {**entry, "sha256": others}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
