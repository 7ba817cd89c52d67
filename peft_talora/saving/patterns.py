"""Regular expressions that come with a file: a bad one is refused, one that would take forever too."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator

from peft import PeftConfig

# matching the names of a large model's modules takes a few milliseconds
TIMEOUT = 0.5
# what PEFT makes of the entries of a configuration; as one process for all, since a match cannot be interrupted
_MATCH = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for form in ("{}", r"(^|.*\\.){}($|\\..*)", r"(.*\\.)?({})$"):
        form = re.compile(form.replace("{}", pattern))
        for name in names:
            form.fullmatch(name), form.match(name)
"""


def check_patterns(config: PeftConfig, names: Iterable[str]) -> None:
    """Refuse a PEFT configuration with a regular expression that is none, or that does not come to an end.

    Args:
        config: The configuration.
        names: The names of the model's modules, which PEFT matches.

    Raises:
        ValueError: The message names the expression.
    """
    patterns = {pattern: field for field, pattern in _patterns(config) if not re.fullmatch(r"[\w.\-]*", pattern)}
    for pattern, field in patterns.items():
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"`{field}` has no regular expression {pattern!r}: {error}.") from error
    if patterns and sys.executable:
        _check_time(patterns, list(names))


def _patterns(config: PeftConfig) -> Iterator[tuple[str, str]]:
    """Every entry that PEFT matches with names of modules, `(field, expression)`."""
    for field in (
        "target_modules",
        "exclude_modules",
        "layers_pattern",
        "modules_to_save",
        "rank_pattern",
        "alpha_pattern",
    ):
        value = getattr(config, field, None) or ()
        for entry in [value] if isinstance(value, str) else value:
            yield field, str(entry)


def _check_time(patterns: dict[str, str], names: list[str]) -> None:
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCH],
            input=json.dumps([list(patterns), names]).encode(),
            capture_output=True,
            timeout=TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        shown = ", ".join(f"{field}={pattern!r}" for pattern, field in patterns.items())
        raise ValueError(
            f"The regular expression takes too long to match the names of the model's modules: {shown:.300}."
        ) from error
