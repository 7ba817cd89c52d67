"""Pretrain a small SAM or SAM 2 on rendered rooms with SAM's own objective: prompts in, masks out.

The examples and tests need a pretrained `SamModel` that loads in a moment and runs on a CPU. This script makes it, and a
`Sam2Model` beside it: boxes and points on instances of `examples/scenes.py` are the prompts, the instances' masks are the targets, and no
other label is used. The whole schedule (warm-up, curriculum, learning-rate decay) is a function of the wall-clock time
spent, so that a run takes `--minutes` on whatever machine it is started, and an interrupted run resumes where it was.

    python examples/tiny_sam/pretrain.py --minutes 52
    python examples/tiny_sam/pretrain.py --base tiny_sam2 --minutes 52
    python examples/tiny_sam/pretrain.py --evaluate-only
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

# Threads that spin while they wait lose most of their time on a machine that has other work to do.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import extras  # noqa: F401

# isort: split
import torch
from pretraining.card import export, model_card
from pretraining.evaluation import evaluate
from pretraining.model import BASES, build_model
from pretraining.objective import training_loss
from pretraining.rooms import load_arrays
from scenes import default_cache_dir
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

HERE = Path(__file__).resolve().parent
# in the names of the encoder's and the decoder's layers
BLOCKS = ("layers", "blocks", "transformer")
# options that a card names where they were not the defaults
RECIPE = ("scenes", "batch_size", "prompts", "lr", "weight_decay", "focal_weight", "gamma", "muon", "bf16", "average_steps", "seed")  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What a checkpoint holds: the model, the moving average of its weights, the optimizers and the counters.

    `state` counts "step" and "images", and the "elapsed" seconds of training.
    """

    model: PreTrainedModel
    average: PreTrainedModel
    optimizers: list[torch.optim.Optimizer]
    state: dict[str, float]


def build_optimizers(model: PreTrainedModel, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Return AdamW, and Muon for the encoder's and decoder's matrices if `--muon`; no decay on vectors."""
    groups: dict[str, list] = {"matrices": [], "others": [], "vectors": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim == 2 and any(part in name for part in BLOCKS) and "rel_pos" not in name
        kind = "matrices" if plain and "embed" not in name else "others" if parameter.ndim > 1 else "vectors"
        groups[kind].append(parameter)
    adam = [
        {"params": groups["others"] + ([] if args.muon else groups["matrices"]), "weight_decay": args.weight_decay},
        {"params": groups["vectors"], "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(adam, lr=args.lr, betas=(0.9, 0.98))]
    if args.muon:
        muon = torch.optim.Muon(
            groups["matrices"], lr=args.lr, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        optimizers.append(muon)
    return optimizers


def rate(progress: float) -> float:
    """Return the learning rate as a fraction of its peak: 2 % warm-up, then a cosine to zero."""
    return min(progress / 0.02, 0.5 + 0.5 * math.cos(math.pi * min(progress, 1))) + 1e-4


def restore(run: Run, path: Path) -> None:
    """Load the state of an interrupted run in place."""
    saved = torch.load(path, weights_only=True)
    run.model.load_state_dict(saved["model"])
    run.average.load_state_dict(saved["average"])
    for optimizer, values in zip(run.optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(values)
    run.state.update(saved["state"])
    # Draw other batches than those before the interruption.
    torch.manual_seed(run.state["step"] + 1)


def save(run: Run, path: Path) -> None:
    """Write a checkpoint and rename it into place, so that an interruption leaves the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    saved = {
        "model": run.model.state_dict(),
        "average": run.average.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
        "state": run.state,
    }
    torch.save(saved, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def train_step(run: Run, data: dict[str, Tensor], progress: float, args: argparse.Namespace) -> float:
    """Take one step of all optimizers and of the moving average; return the loss."""
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate(progress)
    loss = training_loss(run.model, data, progress, args)
    loss.backward()
    trained = [p for p in run.model.parameters() if p.requires_grad]
    nn.utils.clip_grad_norm_(trained, 1.0)
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    averaged = [p for p, q in zip(run.average.parameters(), run.model.parameters(), strict=True) if q.requires_grad]
    # The average reaches back over a tenth of the run so far, so that early garbage is forgotten.
    horizon = min(1 + run.state["step"] / 10, args.average_steps)
    torch._foreach_lerp_(averaged, [p.detach() for p in trained], 1 / horizon)
    run.state["step"] += 1
    run.state["images"] += args.batch_size
    return loss.item()


def report(run: Run, losses: list[float], held_out: dict[str, Tensor]) -> dict[str, float]:
    """Print one JSON line with the time, the speed, the mean loss and the held-out IoUs; return the IoUs."""
    scores, state = evaluate(run.average, held_out), run.state
    line = {"minutes": round(state["elapsed"] / 60, 2), "step": state["step"]}
    line |= {"images/s": round(state["images"] / max(state["elapsed"], 1), 1)}
    line |= {"loss": round(sum(losses) / max(len(losses), 1), 4)}
    print(json.dumps(line | scores), flush=True)
    return scores


def write_model(run: Run, scores: dict[str, float], args: argparse.Namespace, **evaluated: object) -> None:
    """Write the averaged model with a card that says how it was made and how good it is."""
    facts = run.state | {"recipe": recipe(args)} | evaluated
    export(run.average, args.output, model_card(run.average, scores, facts, args))


def recipe(args: argparse.Namespace) -> str:
    """Return the options, beside base and minutes, that make a run another one than that of the defaults."""
    default, words = vars(parse_args([])), ""
    for name in RECIPE:
        value, flag = getattr(args, name), name.replace("_", "-")
        if value != default[name]:
            words += f" --{'' if value else 'no-'}{flag}" if isinstance(value, bool) else f" --{flag} {value:g}"
    return words


def train(args: argparse.Namespace) -> None:
    """Train until `args.minutes` are spent, with a checkpoint and a usable model every `args.report_every` seconds."""
    torch.manual_seed(args.seed)
    data = load_arrays("pretrain", args.scenes, args.cache_dir)
    held_out = load_arrays("validation", 100, args.cache_dir)
    model = build_model(BASES[args.base]).train()
    average = copy.deepcopy(model).requires_grad_(False)
    run = Run(model, average, build_optimizers(model, args), {"step": 0, "images": 0, "elapsed": 0.0})
    checkpoint = args.work_dir / "checkpoint.pt"
    if args.resume and checkpoint.exists():
        restore(run, checkpoint)
    budget, losses, reported, clock = 60 * args.minutes, [], run.state["elapsed"], time.monotonic()
    while run.state["elapsed"] < budget:
        losses.append(train_step(run, data, run.state["elapsed"] / budget, args))
        now = time.monotonic()
        run.state["elapsed"], clock = run.state["elapsed"] + now - clock, now
        if run.state["elapsed"] - reported >= args.report_every:
            scores = report(run, losses, held_out)
            save(run, checkpoint)
            write_model(run, scores, args, split="validation", test_scenes=100)
            # Time spent on evaluation is not training time.
            losses, reported, clock = [], run.state["elapsed"], time.monotonic()
    save(run, checkpoint)
    scores = report(run, losses, load_arrays("test", args.test_scenes, args.cache_dir))
    write_model(run, scores, args, split="test")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pretrain a small SAM or SAM 2 on rendered rooms.")
    parser.add_argument("--base", choices=BASES, default="tiny_sam", help="which of the two")
    parser.add_argument("--minutes", type=float, default=52, help="training time; the whole schedule scales with it")
    parser.add_argument("--scenes", type=int, default=8000, help="number of pretraining scenes")
    parser.add_argument("--test-scenes", type=int, default=200, help="number of scenes of the final evaluation")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=8, help="prompts per image, half of them boxes")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--focal-weight", type=float, default=2.0)
    parser.add_argument("--gamma", type=float, default=0.0)
    parser.add_argument("--muon", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--average-steps", type=int, default=200, help="horizon of the weights' moving average")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report-every", type=float, default=180, help="seconds between evaluations and checkpoints")
    parser.add_argument("--resume", action="store_true", help="resume from the checkpoint in --work-dir")
    parser.add_argument("--evaluate-only", action="store_true", help="print the IoUs of the model in --output")
    parser.add_argument("--cache-dir", help="folder of the rendered scenes")
    parser.add_argument("--work-dir", type=Path, help="folder of the checkpoint")
    parser.add_argument("--output", type=Path, help="folder of the model; default: that of the base")
    args = parser.parse_args(argv)
    args.work_dir = args.work_dir or default_cache_dir().parent / args.base
    args.output = args.output or HERE.parent / args.base
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    logging.disable_progress_bar()
    if args.evaluate_only:
        model = BASES[args.base].model_class.from_pretrained(args.output)
        print(json.dumps(evaluate(model, load_arrays("test", args.test_scenes, args.cache_dir)), indent=2))
        return
    train(args)


if __name__ == "__main__":
    main()
