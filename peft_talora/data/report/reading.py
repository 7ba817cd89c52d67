"""All rows, in parallel, and only once as long as their files stay the same."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ...kinds import TaskSpec
from ..columns import IMAGE_COLUMN, task_column
from ..rows import array_rows, column_names, file_state, place_of, stored_rows
from .row import examine_row

# Raised where what is kept of a row changes.
_FORMAT = 1
_MOST_THREADS = 16


def examine_rows(
    rows: Any, tasks: Mapping[str, TaskSpec], title: str = "", cache: Path | None = None, progress: bool = True
) -> list[dict[str, Any]]:
    """What [`examine_row`] gives of every row; ``{"error": why}`` of one that cannot be read.

    Args:
        rows: Rows of `datasets`, or a list of dicts.
        tasks: ``{name: TaskSpec}``.
        title: What the progress bar is of.
        cache: A file for what was found; rows whose files have the same time and size are not read again. Lists have none.
        progress: Whether there is a bar.
    """
    columns = [task_column(name) for name in tasks if task_column(name) in column_names(rows)]
    reader = array_rows(rows, [IMAGE_COLUMN, *columns])
    known = _load(cache)
    keys = _keys(rows) if cache else [None] * len(rows)

    def examine(index: int) -> dict[str, Any]:
        key = keys[index]
        if key is not None and key in known:
            return known[key]
        try:
            return examine_row(lambda: reader[index], tasks)
        except Exception as error:  # whatever a broken file makes its reader raise
            return {"error": f"{place_of(rows, index)}: {error or type(error).__name__}"}

    threads = min(_MOST_THREADS, (os.cpu_count() or 1) + 1, max(1, len(rows)))
    with ThreadPoolExecutor(threads) as pool:
        results = pool.map(examine, range(len(rows)))
        shown = tqdm(results, desc=f"checking {title}", total=len(rows), leave=False, disable=not progress)
        examined = list(shown)
    if cache:
        _store(cache, {key: row for key, row in zip(keys, examined, strict=True) if key and "error" not in row})
    return examined


def cache_file(source: str, split: str, tasks: Mapping[str, TaskSpec]) -> Path:
    """Where the findings about a split are kept: below $XDG_CACHE_HOME/peft_talora, or ~/.cache/peft_talora."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peft_talora" / "checks"
    specs = {name: [spec.kind, spec.num_channels, spec.ignore_index] for name, spec in tasks.items()}
    text = json.dumps([_FORMAT, source, split, specs])
    return folder / f"{hashlib.blake2b(text.encode(), digest_size=12).hexdigest()}.json"


def _keys(rows: Any) -> list[str | None]:
    """What is another where a row's content is: its files' times and sizes, or the fingerprint of the data."""
    stored = stored_rows(rows)
    if stored is not None:
        return [json.dumps([file_state(value) for value in row.values()]) for row in stored]
    fingerprint = getattr(rows, "_fingerprint", None)
    return [None if fingerprint is None else f"{fingerprint}/{index}" for index in range(len(rows))]


def _load(cache: Path | None) -> dict[str, Any]:
    try:
        return json.loads(cache.read_text(encoding="utf-8")) if cache else {}
    except (OSError, ValueError):
        return {}


def _store(cache: Path, rows: Mapping[str, Any]) -> None:
    """Keep what was found of rows if that is possible; the next time it is read again otherwise."""
    part = cache.with_suffix(f".{os.getpid()}")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(rows), encoding="utf-8")
        part.replace(cache)
    except OSError:
        part.unlink(missing_ok=True)
