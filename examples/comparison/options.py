"""The options of compare.py, and those in them that go to the training script."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from bases import BASES, DEFAULT
from training import options as training
from training.options import OneLineParser, count, option, whole

from .methods import BASELINE, METHODS, ROWS, Entry

SCRIPT = "compare.py"
FEW_IMAGES = (16, 64, 256)
# where few labels are compared: those between which somebody with few labels would choose
FEW_METHODS = ("lora", "lora_per_task", "lora_all", "talora", "talora_qkv", "talora_unshared")
# five seeds for the table, three for what goes beyond it
SEEDS, FEW_SEEDS = 5, 3
# of rendered scenes; of any other dataset all that it has
SCENES = 512
# options of the training script that a comparison varies, or decides itself
VARIED = ("method", "seed", "lr", "decoder_lr", "rank", "targets", "layers", "config", "max_train_images", "evaluate_on", "one_task_each", "baseline", "resume",
          "output_dir", "overwrite", "checkpoint_every", "keep_checkpoints", "init_from", "eval_only", "push_to_hub",
          "num_threads")  # fmt: skip


def parse_args(argv: Sequence[str] | None = None, description: str = "") -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and those that go to the training script as they are.

    Raises:
        SystemExit: With code 2, after one line that says what is wrong.
    """
    parser = OneLineParser(
        prog=SCRIPT,
        description=description,
        epilog="Other options go to train_multitask.py: --steps 400 --dataset folder:rooms",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--methods", nargs="+", type=Entry.parse, default=[Entry(name) for name in ROWS],
        help=f"rows of the table: {' '.join(METHODS)}, or with a rank or further fields of their own: talora:8, talora:scaling=1 (default: the first {len(ROWS)})")  # fmt: skip
    add(
        "--seeds",
        nargs="+",
        type=whole(0),
        default=list(range(SEEDS)),
        metavar="NUMBER",
        help="the seeds' numbers, not how many there are: 0 1 2 are three seeds, 2 is one. What the table says is a mean over "
        f"them (default: {' '.join(map(str, range(SEEDS)))})",
    )
    add("--num-train", "--max-train-images", type=count, metavar="N", help=f"images of the table (default: {SCENES} scenes, or "
        "all that another dataset has)")  # fmt: skip
    add("--few-labels", action="store_true", help=f"also {FEW_IMAGES} images, as far as there are more, and images labelled for "
        "one task each")  # fmt: skip
    add("--few-seeds", nargs="+", type=whole(0), metavar="NUMBER", help=f"the seeds' numbers of --few-labels (default: the first {FEW_SEEDS} of the "
        "table)")  # fmt: skip
    add("--rate-seeds", nargs="+", type=whole(0), metavar="NUMBER", help="the numbers of the seeds with which learning rates are chosen, at least two (default: the first "
        "two of the table)")  # fmt: skip
    add("--noise", type=count, metavar="THREADS", help="repeat decoders only and TA-LoRA (else the last method) with another number "
        "of CPU threads, to see what that changes")  # fmt: skip
    add("--tasks", nargs="+", help="the tasks (default: those of the dataset, for scenes semantic depth normals)")
    add("--base", default=DEFAULT, help=f"the SAM: {', '.join(BASES)}, a path, or a Hub id such as facebook/sam-vit-base (default: "
        "%(default)s)")  # fmt: skip
    add(
        "--rank",
        type=count,
        default=32,
        help="rank of TA-LoRA on every qkv with no layer shared; the others' follow from it (default: %(default)s)",
    )
    add("--no-tuning", action="store_true", help="take the methods' default learning rates")
    add("--jobs", type=count, default=1, help="runs at once (default: %(default)s)")
    add("--num-threads", type=count, help="CPU threads of a run (default: the training script's)")
    add("--output-dir", type=Path, help="where everything goes (default: runs/comparison/ and the name of the dataset, of "
        "scenes that of the camera)")  # fmt: skip
    add("--report", action="store_true", help="run nothing: tables and plot of what is finished")
    args, common = parser.parse_known_args(argv)
    if Entry(BASELINE) not in args.methods:
        args.methods.insert(0, Entry(BASELINE))
    args.few_seeds = args.few_seeds or args.seeds[:FEW_SEEDS]
    args.rate_seeds = (
        args.rate_seeds or (args.seeds if len(args.seeds) > 1 else [args.seeds[0], args.seeds[0] + 1])[:2]
    )
    if len(set(args.rate_seeds)) < 2 and not args.no_tuning:
        parser.error("--rate-seeds: one seed says nothing of the noise, give at least two, or --no-tuning")
    args.training = check_common(common)
    args.output_dir = args.output_dir or Path("runs/comparison", name_of_data(args.training))
    if args.noise is not None and args.noise == (args.num_threads or default_threads()):
        parser.error(f"--noise {args.noise} is the number of threads that all runs have: give another one")
    return args, common


def name_of_data(training: argparse.Namespace) -> str:
    """A folder's name for a dataset: "nuclei" for folder:data/nuclei, "coco" for coco:labels/coco.json, the camera's for scenes."""
    if training.dataset == "scenes":
        return training.camera
    # its own name, where it is a link, too; a folder's may have dots in it: nyu.v1 and nyu.v2 are two datasets
    path = Path(os.path.abspath(training.dataset.rpartition(":")[2]))
    return path.stem if path.suffix.lower() == ".json" else path.name


def default_threads() -> int:
    # importing it takes seconds, and no other check needs it
    import torch

    return torch.get_num_threads()


def check_common(arguments: Sequence[str]) -> argparse.Namespace:
    """The training script's options in what all runs have in common, however they are written.

    Raises:
        SystemExit: With code 2, after one line: one is wrong, or is what a comparison varies.
    """

    def make() -> argparse.ArgumentParser:
        parser = training.make_parser("", SCRIPT)
        # those of one_run.py
        parser.add_argument("--evaluate-on")
        parser.add_argument("--one-task-each", nargs="+")
        return parser

    varied = [name for name in VARIED if name in training.given_options(make, arguments)]
    if varied:
        make().error(f"{option(varied[0])} is what this script varies or decides")
    return training.parse_args(arguments, prog=SCRIPT)
