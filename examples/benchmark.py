"""What the adapters and mSAM cost on this machine, beside what they are compared with.

    python examples/benchmark.py                                      # the whole table; some minutes on two CPU cores
    python examples/benchmark.py --only layer talora --json rows.json # some of it, and as data
    python examples/benchmark.py --only growth --plot growth.png      # curves instead of ratios
    python examples/benchmark.py --device cuda                        # SAM-B, -L and -H at 1024 pixels in bfloat16

The variants of a row alternate in one process, so that a busy machine slows all of them. Shown are medians with
quartiles over the rounds, the most memory that a call holds at once beside its inputs, and the ratio that the row is
about. A group of rows is one function that yields [`Row`]s; `GROUPS` names them all.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import extras  # noqa: F401

# isort: split
import torch
from benchmarks.attention import attention
from benchmarks.convlora import layers, steps
from benchmarks.decoder import decoder
from benchmarks.growth import Point, draw, growth
from benchmarks.low_rank import low_rank
from benchmarks.measuring import Row
from benchmarks.models import SIZES
from benchmarks.talora import talora
from benchmarks.tasks import tasks

GROUPS: dict[str, Callable[[argparse.Namespace], Iterator[Row | Point]]] = {
    "layer": layers,
    "step": steps,
    "low_rank": low_rank,
    "talora": talora,
    "tasks": tasks,
    "decoder": decoder,
    "attention": attention,
    "growth": growth,
}


def show(row: Row) -> None:
    print(f"\n{row.name}")
    for name, seconds in row.seconds.items():
        low, median, high = statistics.quantiles(seconds, n=4)
        cpu = statistics.median(row.cpu_seconds[name])
        print(f"  {name:16} {median * 1e3:9.2f} ms  ({low * 1e3:.2f} .. {high * 1e3:.2f})  CPU {cpu * 1e3:9.2f} ms"
              f"  {row.peak_bytes[name] / 2**20:9.1f} MiB")  # fmt: skip
    low, _, high = statistics.quantiles(row.ratios(), n=4)
    minus = f", each minus {row.minus}" if row.minus else ""
    limit = f", to be at most {row.limit}" if row.limit else ""
    print(
        f"  {row.of} : {row.to}{minus} = {row.ratio():.3f}  (quartiles of the rounds {low:.3f} .. {high:.3f}{limit}); "
        f"CPU time {row.ratio('cpu_seconds'):.3f}"
    )


def show_point(point: Point) -> None:
    print(
        f"{point.size}, {point.x:5} {point.axis}, {point.way:24} {point.median() * 1e3:9.1f} ms  "
        f"CPU {point.median('cpu_seconds') * 1e3:9.1f} ms  "
        f"{point.peak_bytes / 2**20:9.1f} MiB"
    )


def table(rows: list[Row], device: str) -> str:
    """All rows as Markdown."""
    lines = ["| what | ratio | wall (quartiles) | CPU time | at most | memory | at most |", "|" + "---|" * 7]
    for row in rows:
        low, _, high = statistics.quantiles(row.ratios(), n=4)
        # beside an accelerator the CPU only starts the work
        cpu = f"{row.ratio('cpu_seconds'):.3f}" if device == "cpu" else "-"
        memory = "-" if row.memory_ratio() is None else f"{row.memory_ratio():.3f}"
        minus = f", each minus {row.minus}" if row.minus else ""
        cells = [
            row.name, f"{row.of} : {row.to}{minus}", f"{row.ratio():.3f} ({low:.3f} .. {high:.3f})", cpu,
            row.limit or "-", memory, row.memory_limit or "-",
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=GROUPS, help="groups to run; default: all")
    parser.add_argument("--rounds", type=int, default=7, help="rounds at least")
    parser.add_argument(
        "--seconds", type=float, default=4, help="how long a row lasts at least: short ones get more rounds"
    )
    parser.add_argument(
        "--longest", type=float, default=20, help="a row that has lasted so many seconds ends after three rounds"
    )
    parser.add_argument("--threads", type=int, help="threads on the CPU; default: torch's choice")
    parser.add_argument(
        "--widening", type=int, default=3, help="`layer`: outputs per input; 3 is a fused qkv, 1 a square layer"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--sizes", nargs="+", choices=SIZES, help="sizes of the SAM; default: small on a CPU, else base large huge"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="not for `layer` and `step`; default: float32 on a CPU, else bfloat16",
    )
    parser.add_argument("--json", type=Path, help="write the measurements to this file, too")
    parser.add_argument("--plot", type=Path, help="draw `growth` into this file")
    args = parser.parse_args(argv)
    if args.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {args.rounds}")
    if args.plot and args.only and "growth" not in args.only:
        parser.error("--plot draws the group growth, which --only leaves out")
    on_cpu = args.device == "cpu"
    args.sizes = args.sizes or (["small"] if on_cpu else ["base", "large", "huge"])
    args.dtype = getattr(torch, args.dtype or ("float32" if on_cpu else "bfloat16"))
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    machine = {"torch": torch.__version__, "device": device, "threads": torch.get_num_threads(), "sizes": args.sizes}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    rows, points = [], []
    for name in args.only or GROUPS:
        for found in GROUPS[name](args):
            if isinstance(found, Row):
                show(found)
                rows.append(found)
            else:
                show_point(found)
                points.append(found)
            if args.json:
                write_json(args.json, machine, rows, points)
    if rows:
        print("\n" + table(rows, args.device))
    if args.plot:
        # other processes disturb it less; beside an accelerator the CPU only starts the work
        draw(points, args.plot, "cpu_seconds" if args.device == "cpu" else "seconds")


def write_json(path: Path, machine: dict, rows: list[Row], points: list[Point]) -> None:
    content = {"machine": machine, "rows": [row.to_dict() for row in rows], "growth": [asdict(p) for p in points]}
    path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
