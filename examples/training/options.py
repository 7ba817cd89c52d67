"""The training script's options: what there is, what it must look like, and what fits together."""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bases import BASES, DEFAULT, base_path

METHODS = ("talora", "convlora", "lora", "decoder", "full")
CAMERAS = ("photo", "thermal", "ultrasound")
# learning rates of the adapter's own parameters, chosen on validation scenes (README, "What was measured")
ADAPTER_LR = {"talora": 5e-3, "convlora": 2e-3, "lora": 5e-3, "full": 3e-4}
# the rank at which each method was published; that of lora is talora's
RANK = {"talora": 32, "convlora": 3, "lora": 32}
# a block's linear layers have four times as many inputs and outputs as its qkv, so that a quarter of the rank has about as many parameters
RANK_ON_ALL = RANK | {"talora": 8, "lora": 8}
TARGETS, LAYERS = ("qkv", "all"), ("all", "last-half", "shared-half")
# {field of an adapter's configuration: the option that decides it}
DECIDED = {"r": "--rank", "target_modules": "--targets", "layers_to_transform": "--layers", "tasks": "--tasks"}
# the recipe's scale-crops on NYUv2; train and test scenes are drawn alike, and crops would only take them apart
CROP_SCALES = (1.0, 1.2, 1.5)
SCENE_TASKS = ("semantic", "depth", "normals")
SCENES = {"max_train_images": 512, "max_test_images": 64}
# beyond it, Adam's steps are larger than any weight
LARGEST_RATE = 10.0
# without --checkpoint-every: this many checkpoints in a run, and no longer between them than so many steps
CHECKPOINTS, LONGEST_INTERVAL = 10, 500
# what an adapter given by --init-from says itself
OF_THE_ADAPTER = ("method", "rank", "targets", "layers", "config", "channel_mode", "image_size")
# what says how to train, and nothing where there is no training
OF_TRAINING = ("max_train_images", "task_weights", "crop_scales", "no_flip", "steps", "grad_accumulation", "lr", "decoder_lr", "norm_lr",
               "embedding_lr", "weight_decay", "task_pass", "gradient_checkpointing", "checkpoint_every", "keep_checkpoints",
               "resume", "eval_every", "keep_best", "patience", "push_to_hub")  # fmt: skip


SCRIPT = "train_multitask.py"


class OneLineParser(argparse.ArgumentParser):
    """A mistake is one line, and of many processes the first one says it."""

    def error(self, message: str):
        if os.environ.get("RANK", "0") == "0":
            print(f"{self.prog}: error: {message} (--help lists the options)", file=sys.stderr)
        sys.exit(2)


def whole(low: int) -> Callable[[str], int]:
    """A whole number of at least `low`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"expected a whole number, at least {low}, got {text!r}")
        return int(text)

    return parse


count = whole(1)


def number(low: float, high: float = math.inf) -> Callable[[str], float]:
    """A finite number from `low` to `high`."""

    def parse(text: str) -> float:
        expected = f"expected a number from {low:g}" + (f" to {high:g}" if high < math.inf else "")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or math.isinf(value):
            raise argparse.ArgumentTypeError(f"{expected}, got {text!r}")
        return value

    return parse


def task_weight(text: str) -> tuple[str, float]:
    """TASK=NUMBER, with a number above 0."""
    name, _, value = text.partition("=")
    try:
        weight = float(value)
    except ValueError:
        weight = math.nan
    if not name or not 0 < weight < math.inf:
        raise argparse.ArgumentTypeError(f"expected TASK=NUMBER with a number above 0, got {text!r}")
    return name, weight


def config_field(text: str) -> tuple[str, Any]:
    """FIELD=VALUE; a value is a Python literal (0.1, True, [True, False, True]), or else text."""
    name, equals, value = text.partition("=")
    decider = DECIDED.get(name)
    if not (name.isidentifier() and equals and value):
        raise argparse.ArgumentTypeError(f"expected FIELD=VALUE, got {text!r}")
    if decider is not None:
        raise argparse.ArgumentTypeError(f"{name} is decided by {decider}, got {text!r}")
    if value in ("true", "false"):
        return name, value == "true"
    with contextlib.suppress(ValueError, TypeError, SyntaxError):
        # as a checkpoint's file will have it: a tuple is a list there
        return name, json.loads(json.dumps(ast.literal_eval(value)))
    return name, value


def make_parser(description: str, prog: str = SCRIPT) -> OneLineParser:
    parser = OneLineParser(prog=prog, description=description)

    def group(title: str) -> Callable[..., Any]:
        inside = parser.add_argument_group(title)

        def add(*names: str, help: str, **more: Any) -> None:
            shown = more.get("default") not in (None, False) and "default" not in help
            inside.add_argument(*names, help=help + (" (default: %(default)s)" if shown else ""), **more)

        return add

    add = group("data")
    add("--dataset", default="scenes", help="scenes (rendered here), a folder of parquet files, a Hub id, or folder:PATH, "
        "cityscapes:PATH, pascal_context:PATH for files as they are")  # fmt: skip
    add("--camera", choices=CAMERAS, default="ultrasound", help="what sees the rendered scenes; the small SAM was pretrained "
        "on photos")  # fmt: skip
    add("--max-train-images", "--num-train", type=count, metavar="N", help="train on N images at most, always the same "
        f"ones (default: all; of scenes {SCENES['max_train_images']} are rendered)")  # fmt: skip
    add("--max-test-images", "--num-test", type=count, metavar="N", help="evaluate on N images at most (default: all; of "
        f"scenes {SCENES['max_test_images']} are rendered)")  # fmt: skip
    add("--tasks", nargs="+", metavar="TASK", help="semantic depth normals saliency edges parts, or the names in a "
        "folder's dataset.yaml (default: all that have labels, for scenes the first three)")  # fmt: skip
    add("--task-weights", type=task_weight, nargs="+", action="extend", metavar="TASK=NUMBER", help="how much a task's loss counts beside "
        "the others (default: 1, normals 4)")  # fmt: skip
    add("--crop-scales", type=number(1), nargs="+", metavar="S", help="augmentation: crop to 1/S of the image and enlarge "
        f"(default: 1 for scenes, else {' '.join(f'{scale:g}' for scale in CROP_SCALES)})")  # fmt: skip
    add(
        "--no-flip",
        action="store_true",
        help="augmentation: never mirror an image; a folder's dataset.yaml can say so, too",
    )
    add("--check", action="store_true", help="stop after the report on the data, which every run prints, and draw some rows with "
        "their labels: check.png in the output folder")  # fmt: skip
    add("--skip-bad-files", action="store_true", help="leave out rows that cannot be read, and say how many")
    add("--num-workers", type=whole(0), default=0, metavar="N", help="processes that load data")

    add = group("model")
    add(
        "--base",
        default=DEFAULT,
        help=f"the SAM: {', '.join(BASES)}, a path, or a Hub id such as facebook/sam-vit-base",
    )
    add("--method", choices=METHODS, default="talora", help="lora is PEFT's own; decoder leaves the encoder alone, full trains "
        "all of it")  # fmt: skip
    add("--rank", type=count, help=f"rank of the adapter (default: {RANK['talora']} on every qkv, {RANK_ON_ALL['talora']} on all "
        f"linear layers, for convlora {RANK['convlora']}); of talora more than there are tasks")  # fmt: skip
    add("--targets", choices=TARGETS, help="layers of the encoder that get an adapter: the fused q/k/v projections, or all "
        "linear ones (default: all for talora, else qkv)")  # fmt: skip
    add("--layers", choices=LAYERS, help="blocks of the encoder that get an adapter; shared-half: all, the first half with one "
        "update for all tasks, so that it runs once for all of them (default: shared-half for talora, else all)")  # fmt: skip
    add("--config", type=config_field, nargs="+", action="extend", metavar="FIELD=VALUE", help="further fields of the adapter's configuration: of "
        "TALoraConfig, ConvLoraConfig or PEFT's LoraConfig, such as talora_dropout=0.1 or init_weights=split")  # fmt: skip
    add("--init-from", metavar="ADAPTER", help="start from the weights of this adapter, a folder or a Hub id; it says the "
        "method and all about the model")  # fmt: skip
    add("--channel-mode", choices=("token", "prompt"), default="token", help="one decoder pass per task, or the published one "
        "per output channel")  # fmt: skip
    add("--image-size", type=count, metavar="PIXELS", help="side of the model's input (default: the base's own)")

    add = group("training")
    add("--steps", type=count, default=80, metavar="N", help="optimiser steps")
    add("--batch-size", type=count, default=4, metavar="N", help="images per forward and process")
    add("--grad-accumulation", type=count, default=1, metavar="N", help="forwards per step")
    rate = number(0, LARGEST_RATE)
    rates = ", ".join(f"{value:g} for {method}" for method, value in ADAPTER_LR.items())
    add("--lr", type=rate, help=f"learning rate of the adapter (default: {rates})")
    add("--decoder-lr", type=rate, default=1e-3, metavar="LR", help="learning rate of the mask decoders")
    add("--norm-lr", type=rate, default=1e-3, metavar="LR", help="learning rate of the encoder's LayerNorms")
    add("--embedding-lr", type=rate, default=1e-2, metavar="LR", help="learning rate of the no-mask embeddings")
    add("--weight-decay", type=number(0), default=1e-6, metavar="X", help="AdamW's weight decay")
    add("--task-pass", choices=("joint", "sequential"), default="joint", help="all tasks in one forward, or one after the "
        "other with less memory")  # fmt: skip
    add("--gradient-checkpointing", action="store_true", help="compute activations twice instead of keeping them")
    add(
        "--mixed-precision",
        choices=("no", "fp16", "bf16"),
        help="half precision (default: accelerate's configuration)",
    )
    add("--num-threads", type=count, metavar="N", help="CPU threads of a process (default: torch's own, under accelerate "
        "launch its share of all cores)")  # fmt: skip
    add("--seed", type=whole(0), default=0, help="of starts, order and augmentation")

    add = group("evaluation")
    add("--eval-every", type=count, metavar="N", help="steps between evaluations (default: only at the end; with --keep-best "
        "as often as checkpoints are saved)")  # fmt: skip
    add("--keep-best", metavar="METRIC", help="keep the adapter that is best on validation images instead of the last one: "
        "miou, or TASK/METRIC such as depth/abs_err")  # fmt: skip
    add("--patience", type=count, metavar="N", help="stop early: after N evaluations in a row without a better --keep-best "
        "METRIC (default: never)")  # fmt: skip
    add("--eval-only", action="store_true", help="train nothing: evaluate the adapter of --init-from")
    add("--baseline", metavar="WHAT", help="what Delta_b compares with: a metrics.json, 'train' (decoder-only training at "
        "equal steps first) or 'none' (default: train for scenes, none otherwise)")  # fmt: skip
    add("--report-to", choices=("none", "tensorboard", "trackio", "wandb"), default="none", help="where curves go")

    add = group("output")
    add("--output-dir", type=Path, metavar="DIR", help="where everything goes (default: runs/multitask; with --eval-only "
        "the folder evaluation of the adapter's)")  # fmt: skip
    add("--overwrite", action="store_true", help="write into a folder with files that no run of this script wrote; files of "
        "the same names are lost")  # fmt: skip
    add("--checkpoint-every", type=count, metavar="N", help=f"steps between checkpoints (default: a {CHECKPOINTS}th of all, "
        f"{LONGEST_INTERVAL} at most)")  # fmt: skip
    add("--keep-checkpoints", type=count, default=3, metavar="N", help="how many checkpoints to keep, the last ones")
    add("--resume", metavar="CHECKPOINT", help="latest, or a checkpoint's folder: resume from there, bit for bit as if never "
        "interrupted; --steps may be more than before")  # fmt: skip
    add("--push-to-hub", metavar="ID", help="upload the adapter to this repository on the Hub")
    return parser


def given_options(make: Callable[[], argparse.ArgumentParser], argv: Sequence[str] | None) -> set[str]:
    """The names of the options that a command line sets, however it writes them."""
    # a list, since some options extend theirs, in a copy
    parser, unset = make(), []
    parser.set_defaults(**dict.fromkeys(vars(parser.parse_args([])), unset))
    return {name for name, value in vars(parser.parse_args(argv)).items() if value is not unset}


def parse_args(argv: Sequence[str] | None = None, description: str = "", prog: str = SCRIPT) -> argparse.Namespace:
    """The options, with every default filled in; `prog` is who says what is wrong.

    Raises:
        SystemExit: With code 2, after one line that says what is wrong.
    """
    parser = make_parser(description, prog)
    args = parser.parse_args(argv)
    given = given_options(lambda: make_parser(description, prog), argv)
    problem = misfit(args, given)
    if problem:
        parser.error(problem)
    if args.init_from is not None and "base" not in given:
        args.base = None  # the adapter's own
    fill_in(args)
    return args


def misfit(args: argparse.Namespace, given: set[str]) -> str | None:
    """Why options that were given do not fit together; None where they do."""
    checks: list[tuple[bool, Sequence[str], str]] = [
        (args.dataset != "scenes", ["camera"], "is for rendered scenes, not for --dataset " + args.dataset),
        (args.method not in RANK, ["rank"], f"does not apply to --method {args.method}: it has no rank"),
        (args.method not in RANK, ["targets", "layers", "config"], f"does not apply to --method {args.method}: it has no adapter"),
        (args.layers == "shared-half" and args.method != "talora", ["layers"], f"shared-half is for --method talora: with {args.method} all tasks share all updates"),
        ("shared_layers" in dict(args.config or []), ["layers"], "and --config shared_layers say the same: give one of them"),
        (args.method not in ADAPTER_LR, ["lr"], "does not apply to --method decoder: there is no adapter, see --decoder-lr"),
        (args.keep_best is None, ["patience"], "needs --keep-best METRIC"),
        (args.init_from is not None, OF_THE_ADAPTER, "cannot be chosen with --init-from: the adapter says it"),
        (args.init_from is not None, ["resume"], "resumes a run, --init-from starts one: give one of them"),
        (args.eval_only, OF_TRAINING, "does not apply to --eval-only"),
        (args.eval_only and args.baseline == "train", ["baseline"], "train does not apply to --eval-only: give a metrics.json"),
    ]  # fmt: skip
    for wrong, names, why in checks:
        found = [name for name in names if name in given]
        if wrong and found:
            return f"{option(found[0])} {why}"
    if args.eval_only and args.init_from is None:
        return "--eval-only needs --init-from ADAPTER"
    if args.baseline not in (None, "train", "none") and not Path(args.baseline).is_file():
        return f"--baseline: there is no file {args.baseline}"
    for each in ("task_weights", "config"):
        twice = repeated(name for name, _ in getattr(args, each) or [])
        if twice is not None:
            return f"{option(each)}: {twice} is there twice"
    return None


def repeated(names: Iterable[str]) -> str | None:
    """The first name that is there more than once."""
    return next((name for name, number in Counter(names).items() if number > 1), None)


def option(name: str) -> str:
    """The option of an argument's name."""
    return f"--{name.replace('_', '-')}"


def fill_in(args: argparse.Namespace) -> None:
    """Defaults that depend on other options."""
    scenes = args.dataset == "scenes"
    if scenes:
        for name, images in SCENES.items():
            setattr(args, name, getattr(args, name) or images)
    if args.targets is None:
        args.targets = "all" if args.method == "talora" else "qkv"
    if args.rank is None:
        args.rank = (RANK_ON_ALL if args.targets == "all" else RANK).get(args.method)
    if args.layers is None:
        args.layers = "shared-half" if args.method == "talora" else "all"
    if args.lr is None:
        args.lr = ADAPTER_LR.get(args.method)
    if args.crop_scales is None:
        args.crop_scales = [1.0] if scenes else list(CROP_SCALES)
    args.task_weights, args.config = dict(args.task_weights or []), dict(args.config or [])
    args.base = base_path(args.base)
    if args.baseline is None:
        fresh = scenes and args.method != "decoder" and args.init_from is None
        args.baseline = "train" if fresh else "none"
    if args.checkpoint_every is None:
        args.checkpoint_every = min(math.ceil(args.steps / CHECKPOINTS), LONGEST_INTERVAL)
    if args.eval_every is None and args.keep_best is not None:
        args.eval_every = args.checkpoint_every
    if args.output_dir is None:
        adapter = Path(args.init_from or "")
        evaluation = adapter / "evaluation" if adapter.is_dir() else Path("runs/evaluation")
        args.output_dir = evaluation if args.eval_only else Path("runs/multitask")
