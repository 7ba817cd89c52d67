"""Train one SAM for several dense tasks at once, and save the small adapter that makes the difference.

    accelerate launch examples/train_multitask.py

trains classes, depth and normals on rooms in ultrasound, rendered here, from the small SAM beside this script, which was
pretrained on photos of rooms; a few minutes on two CPU cores. Read from top to bottom: data, model, optimiser, loop, evaluation. `--help` lists what can be changed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import shutil
import sys
import time
from itertools import chain
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import DistributedType, GradientAccumulationPlugin, gather_object, send_to_device, set_seed
from peft import LoraConfig, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

import peft_talora as pt
from peft_talora.data import (
    TASK_COLUMNS,
    Augmentation,
    MultiTaskDataset,
    collate,
    detect_tasks,
    load_multitask_dataset,
)
from peft_talora.metrics import HIGHER_IS_BETTER, MultiTaskMetrics
from peft_talora.msam.labels import label_tensor
from peft_talora.msam.loading import load_sam
from peft_talora.saving.directory import written_aside

sys.path.insert(0, str(Path(__file__).parent))
from checkpoints import (
    Checkpoint,
    check_arguments,
    find_checkpoint,
    random_state,
    save_checkpoint,
    set_aside,
    set_random_state,
)
from pictures import draw_predictions

METHODS = ("talora", "convlora", "lora", "decoder", "full")
# learning rates of the adapter's own parameters, chosen on validation scenes (README, "What was measured")
ADAPTER_LR = {"talora": 5e-3, "convlora": 2e-3, "lora": 5e-3, "decoder": 0.0, "full": 3e-4}
# shares of the steps in which a learning rate climbs: what the decoders ask of the encoder means little at first
WARMUP, ENCODER_WARMUP = 0.05, 0.4
# the rank at which each method was published; that of lora is talora's
RANK = {"talora": 32, "convlora": 3, "lora": 32, "decoder": 1, "full": 1}
# arguments that a resumed run may change: they do not change what is trained
FREE_ARGUMENTS = ("output_dir", "resume", "checkpoint_every", "keep_checkpoints", "eval_every", "baseline", "report_to",
                  "num_workers", "num_threads", "gradient_checkpointing", "push_to_hub")  # fmt: skip
# the recipe's scale-crops on NYUv2; train and test scenes are drawn alike, and crops would only take them apart
CROP_SCALES = (1.0, 1.2, 1.5)
# the recipe's weights on NYUv2: the cosine loss of normals is small beside the others
TASK_WEIGHTS = {"normals": 4.0}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--base", default="tiny_sam", help="the SAM: tiny_sam, a path, or a Hub id such as facebook/sam-vit-base")
    add("--dataset", default="scenes", help="scenes (rendered here), a folder of parquet files, a Hub id, "
        "or folder:PATH, cityscapes:PATH, pascal_context:PATH for files as they are")  # fmt: skip
    add("--camera", choices=("photo", "thermal", "ultrasound"), default="ultrasound", help="what sees the rendered scenes; "
        "the small SAM was pretrained on photos")  # fmt: skip
    add("--num-train", type=int, default=512, help="rendered scenes to train on")
    add("--num-test", type=int, default=64, help="rendered scenes to test on")
    add("--tasks", nargs="+", help="semantic depth normals saliency edges parts; default: all that have labels, "
        "for scenes the first three")  # fmt: skip
    add(
        "--method",
        choices=METHODS,
        default="talora",
        help="lora is PEFT's own; decoder leaves the encoder alone, full trains all of it",
    )
    add("--rank", type=int, help="rank of the adapter; default: 32, for convlora 3")
    add("--init-weights", default=None, help="TALoraConfig.init_weights: lora, True, orthogonal or normalized")
    add("--task-pass", choices=("joint", "sequential"), default="joint",
        help="all tasks in one forward, or one after the other with less memory")  # fmt: skip
    add("--channel-mode", choices=("token", "prompt"), default="token",
        help="one decoder pass per task, or the published one per output channel")  # fmt: skip
    add("--one-task-each", nargs="+", metavar="TASK",
        help="partly labelled data: image i keeps its labels of one of these tasks, the next one in turn")  # fmt: skip
    add("--evaluate-on", choices=("test", "validation"), default="test", help="the split that is evaluated")
    add("--image-size", type=int, help="side of the model's input in pixels; default: the base's own")
    add("--crop-scales", type=float, nargs="+",
        help="augmentation: crop to 1/scale of the image and enlarge; default: 1 for scenes, else 1 1.2 1.5")  # fmt: skip
    add("--steps", type=int, default=240, help="optimiser steps")
    add("--batch-size", type=int, default=4, help="images per step and process")
    add("--grad-accumulation", type=int, default=1)
    add("--lr", type=float, help="learning rate of the adapter; default: the method's own")
    add("--decoder-lr", type=float, default=1e-3, help="learning rate of the mask decoders")
    add("--norm-lr", type=float, default=1e-3, help="learning rate of the encoder's LayerNorms")
    add("--embedding-lr", type=float, default=1e-2, help="learning rate of the no-mask embeddings")
    add("--weight-decay", type=float, default=1e-6)
    add("--seed", type=int, default=0)
    add("--mixed-precision", choices=("no", "fp16", "bf16"), help="default: accelerate's configuration")
    add("--gradient-checkpointing", action="store_true")
    add("--num-threads", type=int,
        help="CPU threads of a process; default: torch's own, under accelerate launch its share of all cores")  # fmt: skip
    add("--num-workers", type=int, default=0, help="processes that load data")
    add("--output-dir", type=Path, default=Path("runs/multitask"))
    add("--checkpoint-every", type=int, help="steps between checkpoints; default: only the last step")
    add("--keep-checkpoints", type=int, default=3, help="how many checkpoints to keep, the last ones")
    add("--resume", help="latest, or a checkpoint's directory: go on from there, bit for bit as if never interrupted")
    add("--eval-every", type=int, help="steps between evaluations; default: only at the end")
    add("--baseline", help="what Delta_b compares with: a metrics.json, 'train' (decoder-only training at equal steps "
        "first) or 'none'; default: train for scenes, none otherwise")  # fmt: skip
    add("--report-to", choices=("none", "tensorboard", "trackio"), default="none")
    add("--push-to-hub", metavar="ID", help="upload the adapter to this repository on the Hub")
    args = parser.parse_args(argv)
    args.rank = RANK[args.method] if args.rank is None else args.rank
    for name in ("steps", "batch_size", "grad_accumulation", "rank", "num_train", "num_test", "keep_checkpoints",
                 "num_threads"):  # fmt: skip
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.crop_scales is None:
        args.crop_scales = [1.0] if args.dataset == "scenes" else list(CROP_SCALES)
    if args.base == "tiny_sam":
        args.base = str(Path(__file__).parent / "tiny_sam")
    if args.baseline is None:
        args.baseline = "train" if args.dataset == "scenes" and args.method != "decoder" else "none"
    for name in args.one_task_each or []:
        if name not in TASK_COLUMNS:
            parser.error(f"--one-task-each: unknown task {name!r}, expected some of {list(TASK_COLUMNS)}")
    if args.baseline not in ("train", "none") and not Path(args.baseline).is_file():
        parser.error(f"--baseline: there is no file {args.baseline}")
    return args


# --- Data -----------------------------------------------------------------------------------------------------------


def load_data(args: argparse.Namespace, image_size: int):
    """Rows to train on, rows to evaluate on, and the tasks."""
    if args.dataset == "scenes":
        from scenes import CLASSES, load_scenes

        splits = {name: load_scenes(name, num, size=image_size, seed=0, camera=args.camera) for name, num in
                  (("train", args.num_train), (args.evaluate_on, args.num_test))}  # fmt: skip
        tasks = detect_tasks(splits["train"], args.tasks or ["semantic", "depth", "normals"], {"semantic": CLASSES})
    else:
        splits = load_multitask_dataset(args.dataset)
        tasks = detect_tasks(splits, args.tasks)
    weigh(tasks)
    return splits["train"], choose_split(splits, args.evaluate_on), tasks


def choose_split(splits, wanted: str):
    """The rows to evaluate on: those of the test split never stand in for validation."""
    choices = ("test", "validation", "val") if wanted == "test" else ("validation", "val")
    found = next((splits[name] for name in choices if name in splits), None)
    if found is None:
        print(f"The dataset has no {wanted} split: the evaluation is on the images it is trained on.")
        return splits["train"]
    return found


def weigh(tasks) -> None:
    """Give the tasks weights that sum to 1, in the recipe's proportions."""
    total = sum(TASK_WEIGHTS.get(name, 1.0) for name in tasks)
    for name, spec in tasks.items():
        spec.weight = TASK_WEIGHTS.get(name, 1.0) / total


class OneTaskEach(MultiTaskDataset):
    """Images that are labelled for one task each: number i for the task `names[i % len(names)]`.

    Those whose task is not wanted have no label and are left out.
    """

    def __init__(self, rows, tasks, processor, *, names: list[str], **options):
        labelled = {index: names[index % len(names)] for index in range(len(rows))}
        self.labelled = [(index, name) for index, name in labelled.items() if name in tasks]
        super().__init__(rows.select([index for index, _ in self.labelled]), tasks, processor, **options)

    def __getitem__(self, index: int) -> dict:
        item = super().__getitem__(index)
        for name, label in item["labels"].items():
            if name != self.labelled[index][1]:
                item["labels"][name] = label_tensor(name, self.tasks[name], None, label.shape[-2:])
        return item


def make_training_set(rows, tasks, processor: pt.MSamProcessor, args: argparse.Namespace) -> MultiTaskDataset:
    options = {"augment": Augmentation(scales=tuple(args.crop_scales)), "seed": args.seed}
    if not args.one_task_each:
        return MultiTaskDataset(rows, tasks, processor, **options)
    return OneTaskEach(rows, tasks, processor, names=args.one_task_each, **options)


def make_loader(dataset: MultiTaskDataset, args: argparse.Namespace, **batches) -> DataLoader:
    # a generator of its own: making an iterator draws a number, which would shift the noise and dropout of the model
    return DataLoader(
        dataset, collate_fn=collate, num_workers=args.num_workers, generator=torch.Generator(), **batches
    )


def endless(accelerator: Accelerator, dataset: MultiTaskDataset, args: argparse.Namespace, start: int = 0):
    """This process's batches from number `start` on, epoch after epoch, each with its own order and augmentation.

    All of it follows from the seed and the batch's number, so that a resumed run goes on in the middle of an epoch, and
    what it had already is not loaded again. accelerate's own loaders would start the epoch again.
    """
    processes, index = accelerator.num_processes, accelerator.process_index
    size = min(args.batch_size, len(dataset) // processes)
    if size == 0:
        raise ValueError(f"the dataset has {len(dataset)} rows to train on, too few for {processes} processes")
    per_epoch = len(dataset) // (size * processes)
    while True:
        epoch, done = divmod(start, per_epoch)
        dataset.set_epoch(epoch)
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(args.seed + epoch))
        batches = order[: per_epoch * processes * size].view(per_epoch, processes, size)[done:, index].tolist()
        for batch in make_loader(dataset, args, batch_sampler=batches):
            yield send_to_device(batch, accelerator.device)
        start += len(batches)


# --- Model ----------------------------------------------------------------------------------------------------------


def add_adapter(msam: pt.MSamForMultiTask, args: argparse.Namespace, method: str):
    if method == "talora":
        init = (
            {}
            if args.init_weights is None
            else {"init_weights": {"True": True}.get(args.init_weights, args.init_weights)}
        )
        return get_peft_model(msam, pt.TALoraConfig(r=args.rank, **init))
    if method == "convlora":
        return get_peft_model(msam, pt.ConvLoraConfig(r=args.rank))
    saved = pt.default_modules_to_save(msam)
    if method == "lora":
        config = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=["qkv"], modules_to_save=saved)
        return get_peft_model(msam, config)
    # no adapter at all: what is trained is trained and saved as it is
    parts = [name for name in saved if not name.startswith("vision_encoder")]
    parts += ["vision_encoder"] if method == "full" else []
    return get_peft_model(msam, LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=parts))


def make_optimizer(model, args: argparse.Namespace, method: str) -> torch.optim.Optimizer:
    """Learning rates of their own for the decoders, their no-mask embeddings, the encoder's norms, and the adapter.

    In prompt mode all channels of a task start alike, and only their embeddings tell them apart: those have to move first.
    """
    msam = model.get_base_model()
    norms = [module for module in msam.vision_encoder.modules() if isinstance(module, nn.LayerNorm)]
    groups = [
        (msam.mask_decoders.parameters(), args.decoder_lr, WARMUP),
        (msam.no_mask_embeds.parameters(), args.embedding_lr, WARMUP),
        (chain.from_iterable(norm.parameters() for norm in norms), args.norm_lr, ENCODER_WARMUP),
        # what is left: the adapter's own
        (model.parameters(), ADAPTER_LR[method] if args.lr is None else args.lr, ENCODER_WARMUP),
    ]
    left = {parameter for parameter in model.parameters() if parameter.requires_grad}
    found = []
    for parameters, lr, warmup in groups:
        own = [parameter for parameter in parameters if parameter in left]
        left.difference_update(own)
        found.append({"params": own, "lr": lr, "warmup": warmup})
    return torch.optim.AdamW([group for group in found if group["params"]], weight_decay=args.weight_decay)


def make_scheduler(optimizer: torch.optim.Optimizer, total: int) -> LambdaLR:
    """Linear decay over `total` steps, times each group's own linear warm-up."""

    def factor(step: int, warmup: float) -> float:
        # not rounded to whole steps: `total` counts every process's, and their number must not matter
        return min(1.0, step / max(1, warmup * total)) * (1 - step / total)

    return LambdaLR(optimizer, [functools.partial(factor, warmup=group["warmup"]) for group in optimizer.param_groups])


# --- Training -------------------------------------------------------------------------------------------------------


def backward_joint(accelerator: Accelerator, model, batch) -> dict[str, float]:
    """All tasks in one forward; where every image is labelled for one task, an encoder pass per image will do."""
    specs = accelerator.unwrap_model(model).get_base_model().task_specs
    output = model(**batch, task_ids=only_labelled_tasks(specs, batch["labels"]))
    accelerator.backward(output.loss)
    return {name: loss.item() for name, loss in output.losses.items()}


def only_labelled_tasks(specs, labels) -> torch.Tensor | None:
    """(B,) The one task that each image has labels for; None where one has more, or none."""
    if len(specs) == 1:
        return None
    known = [spec.task_kind.labelled(labels[name], spec.ignore_index) for name, spec in specs.items()]
    labelled = torch.stack([pixels.flatten(1).any(1) for pixels in known], dim=1).int()
    return labelled.argmax(1) if (labelled.sum(1) == 1).all() else None


def backward_sequential(accelerator: Accelerator, model, batch) -> dict[str, float]:
    """One task after the other: the same gradients, with the memory of one task.

    What the tasks share goes forward once, and backward once with the sum of what they ask of it.
    """
    msam, losses = accelerator.unwrap_model(model).get_base_model(), {}
    # the passes use different decoders, so that gradients are averaged over the processes by hand afterwards;
    # accelerate's no_sync does nothing where torchrun started one process only, and yet the model is wrapped
    with getattr(model, "no_sync", contextlib.nullcontext)():
        with accelerator.autocast():
            trunk = msam.encode_trunk(batch["pixel_values"])
        # of this forward: the next one replaces it
        auxiliary = pt.auxiliary_loss(msam)
        shared = trunk.detach().requires_grad_(trunk.requires_grad)
        for name, spec in msam.task_specs.items():
            output = model(trunk_states=shared, tasks=[name], labels=batch["labels"])
            accelerator.backward(spec.weight * output.losses[name])
            losses[name] = output.losses[name].item()
        # scaled as accelerator.backward scales the tasks' losses
        scale = 1.0 if accelerator.scaler is None else accelerator.scaler.get_scale()
        scale = torch.full_like(auxiliary, scale / accelerator.gradient_accumulation_steps)
        roots = [(root, grad) for root, grad in ((trunk, shared.grad), (auxiliary, scale)) if root.requires_grad]
        if roots:
            torch.autograd.backward(*zip(*roots, strict=True))
    if accelerator.num_processes > 1 and accelerator.sync_gradients:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad = accelerator.reduce(parameter.grad, "mean")
    return losses


def update(accelerator: Accelerator, model, optimizer, scheduler) -> None:
    """A step with the gradients that are there, of norm 1 at most; while they are accumulated, accelerate skips it."""
    if accelerator.sync_gradients:
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()


def train(
    accelerator: Accelerator,
    args: argparse.Namespace,
    data,
    arguments: dict,
    folder: Path,
    checkpoint: Checkpoint | None,
):
    """Train one method and evaluate it: (PeftModel, processor, {task: {metric: value}}, seconds).

    The method is that of `arguments`, which are written into the checkpoints in `folder`; training goes on from
    `checkpoint` where there is one.
    """
    train_rows, test_rows, tasks = data
    method = arguments["--method"]
    set_seed(args.seed)
    msam = pt.MSamForMultiTask.from_sam(args.base, tasks, args.image_size, args.channel_mode)
    model = add_adapter(msam, args, method)
    if checkpoint is not None:
        checkpoint.load_adapter(model)
    if args.gradient_checkpointing:
        # the newer name where there is one: transformers drops the older one in version 6
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    processor = pt.MSamProcessor.from_model(msam)
    dataset = make_training_set(train_rows, tasks, processor, args)
    test_dataset = MultiTaskDataset(test_rows, tasks, processor)
    test_loader = make_loader(test_dataset, args, batch_size=min(args.batch_size, len(test_dataset)))
    optimizer = make_optimizer(model, args, method)
    # the scheduler of accelerate steps once per process
    scheduler = make_scheduler(optimizer, args.steps * accelerator.num_processes)
    model, optimizer, scheduler, test_loader = accelerator.prepare(model, optimizer, scheduler, test_loader)
    if accelerator.process_index > 0:
        # the processes see different images: noise and dropout are to differ, too
        set_seed(args.seed + accelerator.process_index)
    step, earlier_seconds = 0, 0.0
    if checkpoint is not None:
        step, earlier_seconds = checkpoint.step, go_on(accelerator, checkpoint, optimizer, scheduler)
    model.train()
    batches = endless(accelerator, dataset, args, start=step * args.grad_accumulation)
    started = time.perf_counter() - earlier_seconds
    backward = backward_joint if args.task_pass == "joint" else backward_sequential
    progress = tqdm(total=args.steps, initial=step, desc=method, disable=not accelerator.is_local_main_process)
    while step < args.steps:
        with accelerator.accumulate(model):
            losses = backward(accelerator, model, next(batches))
            update(accelerator, model, optimizer, scheduler)
        if not accelerator.sync_gradients:
            continue
        step += 1
        progress.update()
        progress.set_postfix({name: f"{loss:.3f}" for name, loss in losses.items()})
        accelerator.log({f"{method}/loss/{name}": loss for name, loss in losses.items()}, step=step)
        if method == "convlora" and args.report_to != "none":
            accelerator.log(usage_shares(accelerator.unwrap_model(model)), step=step)
        if args.eval_every and step % args.eval_every == 0 and step < args.steps:
            results = evaluate(accelerator, model, test_loader, tasks)
            accelerator.log({f"{method}/{t}/{m}": v for t, r in results.items() for m, v in r.items() if v is not None},
                            step=step)  # fmt: skip
            accelerator.print("\n" + table({f"step {step}": results}))
        if step == args.steps or (args.checkpoint_every and step % args.checkpoint_every == 0):
            # the state of every process, written by one
            state = {
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "scaler": accelerator.scaler and accelerator.scaler.state_dict(),
                "random": gather_object([random_state()]),
                "seconds": time.perf_counter() - started,
            }
            if accelerator.is_main_process:
                unwrapped = accelerator.unwrap_model(model)
                save_checkpoint(folder, step, unwrapped, state, arguments, args.keep_checkpoints)
            accelerator.wait_for_everyone()
    progress.close()
    seconds = time.perf_counter() - started
    results = evaluate(accelerator, model, test_loader, tasks)
    return accelerator.unwrap_model(model), processor, results, seconds


def usage_shares(model) -> dict[str, float]:
    """Which share of a layer's windows each expert of Conv-LoRA got in the last forward."""
    return {
        f"convlora/experts/{layer.removeprefix('base_model.model.')}/{scale}x": count / sum(counts)
        for layer, counts in ((layer, counts.tolist()) for layer, counts in pt.expert_usage(model).items())
        for scale, count in enumerate(counts, start=1)
    }


# --- Resuming -------------------------------------------------------------------------------------------------------


def run_arguments(accelerator: Accelerator, args: argparse.Namespace, data) -> dict:
    """What a resumed run must have in common with the run that it goes on with."""
    named = {f"--{name.replace('_', '-')}": v for name, v in vars(args).items() if name not in FREE_ARGUMENTS}
    return {
        **named,
        "--tasks": list(data[2]),
        "--mixed-precision": accelerator.mixed_precision,
        "training rows": len(data[0]),
        "test rows": len(data[1]),
        "processes": accelerator.num_processes,
    }


def go_on(accelerator: Accelerator, checkpoint: Checkpoint, optimizer, scheduler) -> float:
    """Take over a checkpoint's optimiser, schedule and random numbers: the seconds of training that it stands for."""
    state = checkpoint.training_state()
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    set_random_state(state["random"][accelerator.process_index])
    return state["seconds"]


def train_baseline(accelerator: Accelerator, args: argparse.Namespace, data, arguments: dict):
    """The results of decoder-only training; a resumed run does not do again what it had finished."""
    arguments = {**arguments, "--method": "decoder"}
    finished, folder = args.output_dir / "baseline.json", args.output_dir / "baseline_checkpoints"
    if args.resume and finished.is_file():
        saved = json.loads(finished.read_text())
        check_arguments(saved["arguments"], arguments, finished)
        results = saved["tasks"]
    else:
        checkpoint = find_checkpoint(args.resume and "latest", folder, arguments, accelerator.print)
        results = train(accelerator, args, data, arguments, folder, checkpoint)[2]
        if accelerator.is_main_process:
            write_json(finished, {"arguments": arguments, "tasks": results})
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
    return results


def start_anew(output_dir: Path) -> None:
    """An earlier run's checkpoints must not be taken for those of a run that starts from the beginning."""
    moved = set_aside(output_dir / "checkpoints")
    if moved is not None:
        print(f"the checkpoints of an earlier run are now in {moved}; --resume latest would have gone on from them")
    shutil.rmtree(output_dir / "baseline_checkpoints", ignore_errors=True)
    (output_dir / "baseline.json").unlink(missing_ok=True)


def write_json(path: Path, values: dict) -> None:
    """Write a file as a whole or not at all."""
    with written_aside(path.parent) as aside:
        (aside / path.name).write_text(json.dumps(values, indent=2) + "\n")


# --- Evaluation -----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(accelerator: Accelerator, model, loader: DataLoader, tasks) -> dict[str, dict[str, float | None]]:
    """{task: {metric: value}} over all test images of all processes; None where nothing is labelled."""
    was_training = model.training
    model.eval()
    metrics = MultiTaskMetrics(tasks).to(accelerator.device)
    for batch in tqdm(loader, desc="evaluation", leave=False, disable=not accelerator.is_local_main_process):
        metrics.update(model(pixel_values=batch["pixel_values"]).logits, batch["labels"])
    model.train(was_training)
    return metrics.compute()


def table(columns: dict[str, dict[str, dict[str, float | None]]]) -> str:
    """Results side by side: a row per metric, an arrow for the better direction."""
    tasks = next(iter(columns.values()))
    lines = [f"{'task':10} {'metric':16}" + "".join(f"{name:>14}" for name in columns)]
    for task, metrics in tasks.items():
        for metric in metrics:
            arrow = "up" if HIGHER_IS_BETTER[metric] else "down"
            values = [results.get(task, {}).get(metric) for results in columns.values()]
            cells = "".join(f"{'-' if value is None else format(value, '.4f'):>14}" for value in values)
            lines.append(f"{task:10} {metric + ' (' + arrow + ')':16}" + cells)
    return "\n".join(lines)


def read_baseline(path: str) -> dict[str, dict[str, float | None]]:
    try:
        return json.loads(Path(path).read_text())["tasks"]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"--baseline {path} is no metrics.json of this script: {error!r}") from error


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    return Accelerator(
        mixed_precision=args.mixed_precision,
        # every step has the same number of batches, also where an epoch ends
        gradient_accumulation_plugin=GradientAccumulationPlugin(args.grad_accumulation, sync_with_dataloader=False),
        # padding the last batch would count its images twice in the metrics
        dataloader_config=DataLoaderConfiguration(even_batches=False),
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=args.output_dir,
    )


def set_threads(accelerator: Accelerator, number: int | None) -> None:
    """accelerate launch leaves a process one CPU thread unless it is told `--cpu`: give it its share of the cores."""
    if number is None and "ACCELERATE_MIXED_PRECISION" in os.environ and accelerator.device.type == "cpu":
        number = max(1, os.cpu_count() // accelerator.num_processes)
    if number is not None:
        torch.set_num_threads(number)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    accelerator = make_accelerator(args)
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise NotImplementedError(
            f"{accelerator.distributed_type.value} splits the weights over the processes, and this script saves whole ones: "
            "choose plain data parallelism in accelerate's configuration; an adapter is small, and so is its optimiser"
        )
    set_threads(accelerator, args.num_threads)
    accelerator.init_trackers("peft_talora", config={k: str(v) for k, v in vars(args).items()})
    args.output_dir.mkdir(parents=True, exist_ok=True)
    image_size = args.image_size or load_sam(args.base).config.vision_config.image_size
    with accelerator.main_process_first():
        data = load_data(args, image_size)

    if args.resume is None and accelerator.is_main_process:
        start_anew(args.output_dir)
    arguments, checkpoints = run_arguments(accelerator, args, data), args.output_dir / "checkpoints"
    # first of all: nobody wants to hear of a wrong argument after the baseline
    checkpoint = find_checkpoint(args.resume, checkpoints, arguments, accelerator.print)
    baseline = None
    if args.baseline == "train":
        baseline = train_baseline(accelerator, args, data, arguments)
    elif args.baseline != "none":
        baseline = read_baseline(args.baseline)
    model, processor, results, seconds = train(accelerator, args, data, arguments, checkpoints, checkpoint)

    if accelerator.is_main_process:
        pt.save_adapter(model, args.output_dir, metrics=results, dataset=args.dataset)
        processor.save_pretrained(args.output_dir)
        if args.push_to_hub:
            pt.push_adapter(model, args.push_to_hub, metrics=results, dataset=args.dataset)
        draw_predictions(model, processor, data[1], data[2], args.output_dir / "predictions.png")
        report(args, model, results, baseline, seconds)
    accelerator.end_training()


def report(args: argparse.Namespace, model, results, baseline, seconds: float) -> None:
    """Write metrics.json and print the summary."""
    weights = args.output_dir / "adapter_model.safetensors"
    trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    delta = None
    if baseline is not None:
        with contextlib.suppress(ValueError):
            delta = pt.delta_b(results, baseline)
    summary = {
        "method": args.method,
        "seed": args.seed,
        "steps": args.steps,
        "trainable_parameters": sum(trainable.values()),
        "adapter_bytes": weights.stat().st_size,
        "train_seconds": round(seconds, 2),
        "tasks": results,
        "baseline": baseline,
        "delta_b": delta,
    }
    write_json(args.output_dir / "metrics.json", summary)
    columns = {args.method: results} if baseline is None else {"baseline": baseline, args.method: results}
    print("\n" + table(columns))
    adapter = sum(number for name, number in trainable.items() if ".modules_to_save." not in name)
    print(f"\n{sum(trainable.values()):,} trained parameters, {adapter:,} of them the adapter's own "
          f"({adapter * 4 / 1e6:.2f} MB of {weights.stat().st_size / 1e6:.2f} MB in the file: the rest are the tasks' "
          f"decoders and the encoder's norms); {seconds:.0f} s of training")  # fmt: skip
    if args.method == "convlora":
        counts = sum(pt.expert_usage(model).values())
        shares = ", ".join(f"{scale}x {share:.0%}" for scale, share in enumerate(counts / counts.sum(), start=1))
        print(f"Experts in use in the last forward, all layers: {shares}")
    if delta is not None:
        print(f"Delta_b over the baseline: {delta:+.1f} %")
    print(f"adapter, metrics.json and predictions.png are in {args.output_dir}")


if __name__ == "__main__":
    main()
