"""Compare the methods at equal steps, each with its own learning rate, over several seeds.

    python examples/compare.py                # the table: six methods, three seeds; hours on a CPU
    python examples/compare.py --few-labels   # the same for 16, 64 and 256 images and for images labelled for one task each
    python examples/compare.py --report       # tables and plot of what is finished, without a run

Every number comes from a run of train_multitask.py with its own folder in OUTPUT_DIR/runs. What is finished is not run
again, and what was interrupted goes on, so that the same command, or one that asks for more, can be given any time.
The learning rate of a method is the best of three on the validation split with the first seed: its default times 0.4, 1
and 2.5. The decoders' is chosen first, by decoder-only training, and serves all methods. LoRA has the rank at which it
has as many parameters as TA-LoRA; one LoRA per task, all of them together.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import train_multitask
from comparison.jobs import Job, run_all
from comparison.plan import BASELINE, METHODS, Amount, Entry, Plan, matching_ranks
from comparison.report import draw, markdown
from comparison.results import Result, read_result

from peft_talora import delta_b
from peft_talora.saving.directory import written_aside

FEW_IMAGES = (16, 64, 256)
# where few labels are compared: those between which somebody with few labels would choose
FEW_METHODS = ("lora", "lora_per_task", "talora")


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and those that go to the training script as they are."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Other arguments go to train_multitask.py: --steps 400 --dataset folder:rooms",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--methods", nargs="+", type=Entry.parse, default=[Entry(name) for name in METHODS],
        help=f"rows of the table: {' '.join(METHODS)}, or with a rank of their own: talora:8")  # fmt: skip
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--num-train", type=int, default=512, help="images of the table; other datasets than the scenes give all")
    add("--few-labels", action="store_true", help=f"also {FEW_IMAGES} images, and images labelled for one task each")
    add("--few-seeds", nargs="+", type=int, help="seeds of --few-labels; default: those of the table")
    add("--tasks", nargs="+", default=["semantic", "depth", "normals"])
    add("--base", default="tiny_sam", help="the SAM: tiny_sam, a path, or a Hub id such as facebook/sam-vit-base")
    add("--rank", type=int, default=32, help="rank of TA-LoRA; the LoRAs' follows from it")
    add("--no-tuning", action="store_true", help="take the methods' default learning rates")
    add("--jobs", type=int, default=1, help="runs at once")
    add("--num-threads", type=int, help="CPU threads of a run; default: the training script's")
    add("--output-dir", type=Path, default=Path("runs/comparison"))
    add("--report", action="store_true", help="run nothing")
    args, common = parser.parse_known_args(argv)
    for name in ("jobs", "num_train", "rank"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    for name in ("--method", "--seed", "--lr", "--decoder-lr", "--evaluate-on", "--one-task-each", "--baseline"):
        if name in common:
            parser.error(f"{name} is what this script varies")
    if Entry(BASELINE) not in args.methods:
        args.methods.insert(0, Entry(BASELINE))
    args.few_seeds = args.few_seeds or args.seeds
    return args, common


class Runner:
    """Runs what is missing, and says how far it is."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.failures: list[str] = []

    def __call__(self, what: str, jobs: list[Job]) -> None:
        if self.args.report:
            return
        started = time.perf_counter()

        def done(job: Job, number: int, total: int) -> None:
            seconds = time.perf_counter() - started
            left = seconds / number * (total - number)
            print(f"{what}: {number}/{total}, {job.folder.relative_to(self.args.output_dir)}; "
                  f"{seconds / 60:.0f} min, about {left / 60:.0f} min left", flush=True)  # fmt: skip

        try:
            run_all(jobs, self.args.jobs, self.args.num_threads, done)
        except RuntimeError as error:
            self.failures.append(str(error))
            print(error, file=sys.stderr)


def tune(plan: Plan, args: argparse.Namespace, run: Runner) -> tuple[dict[str, float], list[dict]]:
    """The learning rate of each method, and what the validation split said of those that were tried."""
    names = list(dict.fromkeys([BASELINE, *(entry.name for entry in args.methods)]))
    rates = {name: METHODS[name].default_rate for name in names}
    if args.no_tuning:
        return rates, []
    trials: list[dict] = []
    amount, seed = Amount(args.num_train), args.seeds[0]
    # the decoders' rate is part of every other run
    for group in ([BASELINE], names[1:]):
        tried = [(name, rate) for name in group for rate in METHODS[name].rates]
        jobs = [plan.jobs(Entry(name), rates | {name: rate}, amount, seed, "validation") for name, rate in tried]
        # what Delta_b compares with
        jobs.append(plan.jobs(Entry(BASELINE), rates, amount, seed, "validation"))
        run("learning rates", [job for parts in jobs for job in parts.values()])
        base = read_result(plan, Entry(BASELINE), rates, amount, seed, "validation")
        for name, rate in tried:
            result = read_result(plan, Entry(name), rates | {name: rate}, amount, seed, "validation")
            gain = None if result is None or base is None else delta_b(result.tasks, base.tasks)
            trials.append({"method": name, "rate": rate, "delta_b": gain})
        for name in group:
            gains = {t["rate"]: t["delta_b"] for t in trials if t["method"] == name and t["delta_b"] is not None}
            rates[name] = max(gains, key=gains.get, default=rates[name])
    return rates, trials


def cells(args: argparse.Namespace) -> list[tuple[Entry, Amount, int]]:
    """Everything that is to be known: the table first, then few labels."""
    table = [(entry, Amount(args.num_train), seed) for seed in args.seeds for entry in args.methods]
    if not args.few_labels:
        return table
    amounts = [Amount(args.num_train, one_task_each=True), *(Amount(images) for images in FEW_IMAGES)]
    entries = [Entry(BASELINE), *(entry for entry in args.methods if str(entry) in FEW_METHODS)]
    return table + [(entry, amount, seed) for seed in args.few_seeds for amount in amounts for entry in entries]


def write(args: argparse.Namespace, results: list[Result], rates: dict, tuned: list[dict], common: list[str]) -> None:
    settings = {name: getattr(args, name) for name in ("seeds", "tasks", "base", "rank", "num_train")}
    content = {
        "settings": settings | {"training": common},
        "rates": rates,
        "tuning": tuned,
        "results": [result.to_dict() for result in results],
    }
    with written_aside(args.output_dir) as aside:
        (aside / "comparison.json").write_text(json.dumps(content, indent=1) + "\n")
        (aside / "comparison.md").write_text(markdown(results, rates, tuned))
        if results:
            draw(results, aside / "comparison.png")


def main(argv: list[str] | None = None) -> int:
    args, common = parse_args(argv)
    base = str(Path(__file__).parent / "tiny_sam") if args.base == "tiny_sam" else args.base
    tasks = tuple(args.tasks)
    ranks, steps = matching_ranks(base, args.rank, tasks), train_multitask.parse_args(common).steps
    plan = Plan(args.output_dir, tasks, ranks, ("--base", args.base, *common), steps)
    run = Runner(args)
    rates, tuned = tune(plan, args, run)
    wanted = cells(args)
    run(
        "comparison", [job for entry, amount, seed in wanted for job in plan.jobs(entry, rates, amount, seed).values()]
    )
    found = [read_result(plan, entry, rates, amount, seed) for entry, amount, seed in wanted]
    results = [result for result in found if result is not None]
    write(args, results, rates, tuned, common)
    print((args.output_dir / "comparison.md").read_text())
    print(f"{len(results)} of {len(wanted)} results are in {args.output_dir}: comparison.json, .md and .png")
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main())
