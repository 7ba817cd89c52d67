"""Rows of the cost table: two ways to do the same, run in turn."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch.profiler import ProfilerActivity, profile

# calls that take longer are neither warmed up nor repeated more than they must be
LONG_CALL = 2.0
MIN_ROUNDS = 3


@dataclass
class Row:
    """One comparison: the variants' seconds per round and peak bytes, and the ratio `of` : `to`.

    `seconds` is wall time, `cpu_seconds` the time that the process's threads worked, which other processes disturb less.
    Where `minus` names a variant, its time is taken off both sides of the ratio, round by round. `limit` is what the ratio
    of the times should not exceed, `memory_limit` that of the peaks.
    """

    name: str
    of: str
    to: str
    minus: str | None = None
    limit: float | None = None
    memory_limit: float | None = None
    seconds: dict[str, list[float]] = field(default_factory=dict)
    cpu_seconds: dict[str, list[float]] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)

    def ratios(self, clock: str = "seconds") -> list[float]:
        """The ratio of every round; `clock` is "seconds" or "cpu_seconds"."""
        seconds = getattr(self, clock)
        base = seconds[self.minus] if self.minus else [0.0] * len(seconds[self.of])
        sides = zip(seconds[self.of], seconds[self.to], base, strict=True)
        return [(of - minus) / (to - minus) if to != minus else float("nan") for of, to, minus in sides]

    def ratio(self, clock: str = "seconds") -> float:
        """The ratio of the medians."""
        seconds = getattr(self, clock)
        of, to = (statistics.median(seconds[name]) for name in (self.of, self.to))
        minus = statistics.median(seconds[self.minus]) if self.minus else 0.0
        return (of - minus) / (to - minus) if to != minus else float("nan")

    def memory_ratio(self) -> float | None:
        """Peak bytes of `of` to those of `to`; None where one of them allocates nothing."""
        of, to = self.peak_bytes[self.of], self.peak_bytes[self.to]
        return of / to if of and to else None

    def to_dict(self) -> dict:
        return {
            **asdict(self),
            "ratio": self.ratio(),
            "ratios": self.ratios(),
            "cpu_ratio": self.ratio("cpu_seconds"),
            "memory_ratio": self.memory_ratio(),
        }


def measure(row: Row, variants: dict[str, Callable[[], None]], args: argparse.Namespace) -> Row:
    """Run the variants in turn: `args.rounds` rounds, or more until the row took `args.seconds`.

    Rounds stop early after `args.longest` seconds, but there are three at least.
    """
    for call in variants.values():
        start = time.perf_counter()
        call()  # compiles, and warms caches and allocators
        if time.perf_counter() - start < LONG_CALL:
            call()
    row.peak_bytes = {name: peak_memory(call, args.device) for name, call in variants.items()}
    row.seconds, row.cpu_seconds = ({name: [] for name in variants} for _ in range(2))
    started, round_ = time.perf_counter(), 0
    while needs_more(round_, time.perf_counter() - started, args):
        # each of two ways comes first in half of the rounds: what the one leaves in caches, the other finds
        for name, call in list(variants.items())[:: 1 if round_ % 2 else -1]:
            torch.manual_seed(round_)  # the variants of a round draw the same noise, hence the same experts
            wall, cpu = clocked(call, args.device)
            row.seconds[name].append(wall)
            row.cpu_seconds[name].append(cpu)
        round_ += 1
    return row


def needs_more(rounds: int, elapsed: float, args: argparse.Namespace) -> bool:
    """Whether a row that took `elapsed` seconds for its `rounds` needs another one."""
    if rounds >= min(MIN_ROUNDS, args.rounds) and elapsed > args.longest:
        return False
    return rounds < args.rounds or elapsed < args.seconds


def clocked(call: Callable[[], None], device: str) -> tuple[float, float]:
    """Seconds of a call: on the wall's clock, and of work on all threads of this process."""
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    synchronize(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_memory(call: Callable[[], None], device: str) -> int:
    """The most bytes that a call holds at once, beside what was allocated before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()
    held, peak = 0, 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def gradients(outputs: tuple, inputs: list[torch.Tensor], cotangent: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The backward of a layer: `cotangent` for the first output, ones for the others, which are losses."""
    return torch.autograd.grad(outputs, inputs, (cotangent, *(torch.ones_like(o) for o in outputs[1:])))


def assert_equal(got: torch.Tensor, expected: torch.Tensor, what: str, tolerance: float = 1e-5) -> None:
    """Raise AssertionError unless both ways of a row compute the same, up to `tolerance` times the largest value."""
    error, scale = (got - expected).abs().max().item(), expected.abs().max().item()
    if not error <= tolerance * scale:
        raise AssertionError(f"{what}: the two ways differ by {error:.3g}, of values up to {scale:.3g}")
