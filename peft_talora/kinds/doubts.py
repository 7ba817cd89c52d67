"""What is likely wrong with labels, but possible: a warning, or a line of a report."""

from __future__ import annotations

import contextlib
import contextvars
import warnings
from collections.abc import Iterable, Iterator

_collector: contextvars.ContextVar[list[tuple[str, str]] | None] = contextvars.ContextVar("collector", default=None)

# Who was warned of; once per process is enough.
_told: set[str] = set()


def is_wanted(subject: str) -> bool:
    """Whether anybody would hear of a doubt about this subject: looking for one takes time."""
    return _collector.get() is not None or subject not in _told


def tell(subject: str, doubt: str, place: str = "", stacklevel: int = 3) -> None:
    """Warn of a doubt, once per process and subject; or hand it to whoever collects them.

    Args:
        subject: What is doubted, such as "labels of task 'depth'".
        doubt: Why, a sentence.
        place: Where it was seen, such as a file.
        stacklevel: As `warnings.warn` takes it.
    """
    collector = _collector.get()
    if collector is not None:
        collector.append((subject, doubt))
    elif subject not in _told:
        _told.add(subject)
        where = f"{place} ({subject})" if place else subject
        warnings.warn(f"{where}: {doubt}", stacklevel=stacklevel)


@contextlib.contextmanager
def collected() -> Iterator[list[tuple[str, str]]]:
    """(of whom, why) of the doubts that come up in this block, in this thread; nobody is warned of them."""
    doubts: list[tuple[str, str]] = []
    token = _collector.set(doubts)
    try:
        yield doubts
    finally:
        _collector.reset(token)


def tell_no_more(subjects: Iterable[str]) -> None:
    """Warn of these no more: somebody was told of them in another way."""
    _told.update(subjects)


def forget() -> None:
    """Warn again of what was warned of already."""
    _told.clear()
