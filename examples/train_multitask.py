"""Train one SAM for several dense tasks at once, and save the small adapter that makes the difference.

    accelerate launch examples/train_multitask.py

trains classes, depth and normals on rooms in ultrasound, rendered here, from the small SAM beside this script, which was
pretrained on photos of rooms; a few minutes on two CPU cores. Read from top to bottom: data, model, optimiser, loop,
evaluation, all of it. `--help` lists what can be changed; what is not about training is in `training/`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import extras  # noqa: F401
from training import options

if __name__ == "__main__":
    # what is wrong with them is said before the imports below, which take seconds
    options.parse_args(None, __doc__.splitlines()[0])

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from peft import LoraConfig, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

import peft_talora as pt
from peft_talora.data import MultiTaskDataset, collate, collate_own_size
from peft_talora.losses import labelled_per_forward
from peft_talora.metrics import MultiTaskMetrics
from peft_talora.msam.loading import image_size_of, load_sam

sys.path.insert(0, str(Path(__file__).parent))
from pictures import draw_predictions
from training import folder, results, tracking
from training.adapter import adapted_layers, adapter_config, adapter_data, check_config, load_adapter
from training.best import BestAdapter, find_metric
from training.check import check_data
from training.checkpoints import Checkpoint, find_checkpoint
from training.data import Data, load_data
from training.launch import make_accelerator, set_threads
from training.run import Run, at_step, begin, resume, save
from training.shown import keep_predictions, load_maps
from training.stopping import Interrupted, Interruption, check_finite, on_main_process, run_script

# shares of the steps in which a learning rate climbs: what the decoders ask of the encoder means little at first
WARMUP, ENCODER_WARMUP = 0.05, 0.4
# of AdamW: at the start many gradients are zero on paper (the channels of a task are copies of each other, U2 is zero) and
# rounding noise in fact, of 1e-7 and less. 1e-8 makes full steps of the noise, so that a number of threads decides the run.
EPS = 1e-5


# --- Data -----------------------------------------------------------------------------------------------------------


def make_loader(dataset: MultiTaskDataset, args: argparse.Namespace, collate_fn: Callable, **batches) -> DataLoader:
    # a generator of its own: making an iterator draws a number, which would shift the noise and dropout of the model
    return DataLoader(
        dataset, collate_fn=collate_fn, num_workers=args.num_workers, generator=torch.Generator(), **batches
    )


def make_test_loader(rows, tasks, processor: pt.MSamProcessor, args: argparse.Namespace) -> DataLoader:
    """Images to evaluate on, with labels at their own resolution: there published numbers are measured."""
    dataset = MultiTaskDataset(rows, tasks, processor, own_size=True)
    if not len(dataset):
        raise ValueError("there is no image to evaluate on")
    return make_loader(dataset, args, collate_own_size, batch_size=min(args.batch_size, len(dataset)))


def endless(
    accelerator: Accelerator, dataset: MultiTaskDataset, args: argparse.Namespace, start: int = 0
) -> Iterator[dict]:
    """This process's batches from number `start` on, epoch after epoch, each with its own order and augmentation.

    All of it follows from the seed and the batch's number, so that a run is resumed in the middle of an epoch, and
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
        order = np.random.default_rng([args.seed, epoch]).permutation(len(dataset))
        batches = order[: per_epoch * processes * size].reshape(per_epoch, processes, size)[done:, index].tolist()
        for batch in make_loader(dataset, args, collate, batch_sampler=batches):
            yield send_to_device(batch, accelerator.device)
        start += len(batches)


# --- Model ----------------------------------------------------------------------------------------------------------


def make_model(args: argparse.Namespace, method: str, tasks: dict[str, pt.TaskSpec]):
    """A PeftModel around an mSAM, as a fresh start has it."""
    msam = pt.MSamForMultiTask.from_sam(args.base, tasks, args.image_size, args.channel_mode)
    saved = pt.default_modules_to_save(msam)
    if method in options.RANK:
        where = adapted_layers(msam.vision_encoder, args.targets, args.layers)
        return get_peft_model(
            msam, adapter_config(method, args.rank, args.config, list(tasks), modules_to_save=saved, **where)
        )
    # no adapter at all: what is trained is trained and saved as it is
    parts = [name for name in saved if not name.startswith("vision_encoder")]
    parts += ["vision_encoder"] if method == "full" else []
    return get_peft_model(msam, LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=parts))


def make_optimizer(model, args: argparse.Namespace) -> torch.optim.Optimizer:
    """Learning rates of their own for the decoders, their no-mask embeddings, the encoder's norms, and the adapter.

    In prompt mode all channels of a task start alike, and only their embeddings tell them apart: those have to move first.
    """
    msam = model.get_base_model()
    norms = [module for module in msam.vision_encoder.modules() if isinstance(module, nn.LayerNorm)]
    groups = [
        ("decoders", msam.mask_decoders.parameters(), args.decoder_lr, WARMUP),
        ("embeddings", msam.no_mask_embeds.parameters(), args.embedding_lr, WARMUP),
        ("norms", chain.from_iterable(norm.parameters() for norm in norms), args.norm_lr, ENCODER_WARMUP),
        # what is left: the adapter's own
        ("adapter", model.parameters(), args.lr, ENCODER_WARMUP),
    ]
    left = {parameter for parameter in model.parameters() if parameter.requires_grad}
    found = []
    for name, parameters, lr, warmup in groups:
        own = [parameter for parameter in parameters if parameter in left]
        left.difference_update(own)
        if own:
            found.append({"name": name, "params": own, "lr": lr, "warmup": warmup})
    return torch.optim.AdamW(found, weight_decay=args.weight_decay, eps=EPS)


def make_scheduler(optimizer: torch.optim.Optimizer, steps: int, processes: int = 1) -> LambdaLR:
    """Linear decay over the steps, times each group's own linear warm-up; no step has a rate of zero."""

    def factor(count: int, warmup: float) -> float:
        # accelerate's scheduler counts once per process. Not rounded: their number must not matter
        done = count / processes
        return min(1.0, (done + 1) / max(1, warmup * steps)) * (1 - done / steps)

    return LambdaLR(optimizer, [functools.partial(factor, warmup=group["warmup"]) for group in optimizer.param_groups])


# --- Training -------------------------------------------------------------------------------------------------------


def backward_joint(accelerator: Accelerator, model, batch, loss_divisors) -> dict[str, float]:
    """All tasks in one forward; where every image is labelled for one task, an encoder pass per image will do."""
    specs = accelerator.unwrap_model(model).get_base_model().task_specs
    task_ids = only_labelled_tasks(specs, batch["labels"])
    output = model(**batch, task_ids=task_ids, loss_divisors=loss_divisors)
    accelerator.backward(output.loss)
    return {name: loss.item() for name, loss in output.losses.items()}


def only_labelled_tasks(specs, labels) -> torch.Tensor | None:
    """(B,) The one task that each image has labels for; None where one has more, or none."""
    if len(specs) == 1:
        return None
    known = [spec.task_kind.labelled(labels[name], spec.ignore_index) for name, spec in specs.items()]
    labelled = torch.stack([pixels.flatten(1).any(1) for pixels in known], dim=1).int()
    return labelled.argmax(1) if (labelled.sum(1) == 1).all() else None


def backward_sequential(accelerator: Accelerator, model, batch, loss_divisors) -> dict[str, float]:
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
            output = model(trunk_states=shared, tasks=[name], labels=batch["labels"], loss_divisors=loss_divisors)
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


def update(accelerator: Accelerator, model, optimizer, scheduler, losses: dict[str, float]) -> None:
    """A step with the gradients that are there, of norm 1 at most; while they are accumulated, accelerate skips it."""
    if accelerator.sync_gradients:
        norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
        check_finite(accelerator, float(norm), losses)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()


def train_step(
    accelerator: Accelerator, args: argparse.Namespace, model, optimizer, scheduler, batches
) -> dict[str, float]:
    """One optimiser step with several forwards: {task: its loss, as far as this process sees it}."""
    backward = backward_joint if args.task_pass == "joint" else backward_sequential
    specs = accelerator.unwrap_model(model).get_base_model().task_specs
    # with it the gradient is that of one forward of all images, however they are dealt out to forwards and processes
    loss_divisors = labelled_per_forward(specs, batches)
    totals = dict.fromkeys(specs, 0.0)
    for batch in batches:
        with accelerator.accumulate(model):
            for name, loss in backward(accelerator, model, batch, loss_divisors).items():
                totals[name] += loss / len(batches)
            update(accelerator, model, optimizer, scheduler, totals)
    return totals


@dataclass
class Trained:
    """What training gives; the model is as accelerate wraps it."""

    model: Any
    processor: pt.MSamProcessor
    steps: int
    seconds: float
    best: BestAdapter | None = None


def train(run: Run, checkpoint: Checkpoint | None) -> Trained:
    """Train one method, from the beginning or from a checkpoint on."""
    args, accelerator, data = run.args, run.accelerator, run.data
    set_seed(args.seed)
    model = make_model(args, run.method, data.tasks) if run.model is None else run.model
    if checkpoint is not None:
        checkpoint.load_adapter(model)
    if args.gradient_checkpointing:
        # the newer name where there is one: transformers drops the older one in version 6
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    processor = pt.MSamProcessor.from_model(model.get_base_model())
    dataset = data.make_dataset(data.train, data.tasks, processor, augment=data.augment, seed=args.seed)
    best = BestAdapter(find_metric(args.keep_best, data.tasks), args.patience) if args.keep_best else None
    loader = make_test_loader(data.validation if best else data.test, data.tasks, processor, args)
    optimizer = make_optimizer(model, args)
    scheduler = make_scheduler(optimizer, args.steps, accelerator.num_processes)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    if accelerator.process_index > 0:
        # the processes see different images: noise and dropout are to differ, too
        set_seed(args.seed + accelerator.process_index)
    step, earlier_seconds = 0, 0.0
    if checkpoint is not None:
        step, earlier_seconds = checkpoint.step, resume(accelerator, checkpoint, optimizer, scheduler, best)
    model.train()
    batches = endless(accelerator, dataset, args, start=step * args.grad_accumulation)
    started = time.perf_counter() - earlier_seconds
    progress = tqdm(total=args.steps, initial=step, desc=run.method, disable=not accelerator.is_local_main_process)
    run.interruption.training = True
    while step < args.steps and not (best and best.gave_up):
        with at_step(run, step + 1):
            forwards = list(islice(batches, args.grad_accumulation))
            losses = train_step(accelerator, args, model, optimizer, scheduler, forwards)
        step += 1
        progress.update()
        progress.set_postfix({name: f"{loss:.3f}" for name, loss in losses.items()})
        # a tracker has one axis of steps: the baseline's curves would lie over the run's own
        if run.method == args.method:
            tracking.log_step(accelerator, model, run.method, step, losses, optimizer)
        if args.eval_every and (step % args.eval_every == 0 or (best and step == args.steps)):
            found, _ = evaluate(accelerator, model, loader, processor, data.tasks)
            if run.method == args.method:
                tracking.log_results(accelerator, run.method, found, step)
            accelerator.print(f"\n{results.table({f'step {step}': found})}")
            if best:
                best.offer(step, found, accelerator.unwrap_model(model))
        received = run.interruption.agreed(accelerator)
        ended = step == args.steps or (best and best.gave_up)
        if ended or received or step % args.checkpoint_every == 0:
            with at_step(run, step):
                saved = save(run, step, model, optimizer, scheduler, best, time.perf_counter() - started)
        if received and not ended:
            where = f"{saved} is complete" if saved else "its checkpoint could not be written"
            raise Interrupted(received, f"{where}; the same command with --resume latest resumes it")
    run.interruption.training = False
    progress.close()
    if best:
        best.restore(accelerator.unwrap_model(model))
    return Trained(model, processor, step, time.perf_counter() - started, best)


# --- Evaluation -----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(accelerator: Accelerator, model, loader: DataLoader, processor, tasks) -> tuple[dict, dict]:
    """({task: {metric: value}}, {task: {class: IoU}}) over all images of all processes; None where nothing is labelled."""
    was_training = model.training
    model.eval()
    metrics = MultiTaskMetrics(tasks).to(accelerator.device)
    for batch in tqdm(loader, desc="evaluation", leave=False, disable=not accelerator.is_local_main_process):
        metrics.update_images(model(pixel_values=batch["pixel_values"]).logits, batch["labels"], processor.restore)
    model.train(was_training)
    return metrics.compute(), metrics.class_ious()


# --- All of it ------------------------------------------------------------------------------------------------------


def train_baseline(run: Run) -> dict[str, dict[str, float | None]]:
    """The results of decoder-only training; a resumed run does not do again what it had finished."""
    directory, accelerator = run.args.output_dir, run.accelerator
    run = replace(run, method="decoder", checkpoints=directory / folder.BASELINE_CHECKPOINTS, model=None)
    found = results.finished_baseline(directory / folder.BASELINE, run.identity()) if run.args.resume else None
    if found is None:
        checkpoint = find_checkpoint(run.args.resume and "latest", run.checkpoints, run.identity(), accelerator.print)
        trained = train(run, checkpoint)
        found, _ = measure(run, trained)
        if accelerator.is_main_process:
            model, maps = accelerator.unwrap_model(trained.model), directory / folder.BASELINE_MAPS
            keep_predictions(model, trained.processor, run.data.test, run.data.tasks, maps)
            folder.write_json(directory / folder.BASELINE, {"arguments": run.identity(), "tasks": found})
    if accelerator.is_main_process:
        folder.remove(run.checkpoints)
    return found


def measure(run: Run, trained: Trained) -> tuple[dict, dict]:
    """What [`evaluate`] gives on the test images."""
    loader = run.accelerator.prepare(make_test_loader(run.data.test, run.data.tasks, trained.processor, run.args))
    return evaluate(run.accelerator, trained.model, loader, trained.processor, run.data.tasks)


def train_all(run: Run) -> None:
    """Train the baseline and the method; save, evaluate and report."""
    args, accelerator = run.args, run.accelerator
    # first of all: nobody wants to hear of a wrong argument after the baseline
    checkpoint = find_checkpoint(args.resume, run.checkpoints, run.identity(), accelerator.print)
    if args.keep_best:
        find_metric(args.keep_best, run.data.tasks)
    if "shared_layers" in args.config:
        # whether the SAM has these layers
        make_model(args, run.method, run.data.tasks)
    baseline = None if args.baseline in ("train", "none") else results.read_baseline(args.baseline)
    run.name = on_main_process(accelerator, lambda: begin(run, checkpoint))
    if args.baseline == "train":
        baseline = train_baseline(run)
    trained = train(run, checkpoint)
    model = accelerator.unwrap_model(trained.model)
    if accelerator.is_main_process:
        # at once: what comes after it may fail
        results.save_adapter(args, model, trained.processor)
    found, classes = measure(run, trained)
    if accelerator.is_main_process:
        results.save_adapter(args, model, trained.processor, found)
        summary = results.summary(args, run.data, model, found, classes, baseline, trained)
        finish(run, model, trained.processor, summary)
        if args.push_to_hub:
            pt.push_adapter(model, args.push_to_hub, metrics=found, dataset=args.dataset)


def evaluate_only(run: Run) -> None:
    """Evaluate an adapter that exists."""
    args, accelerator = run.args, run.accelerator
    baseline = None if args.baseline == "none" else results.read_baseline(args.baseline)
    processor = pt.MSamProcessor.from_model(run.model.get_base_model())
    model = accelerator.prepare_model(run.model, evaluation_mode=True)
    found, classes = measure(run, Trained(model, processor, 0, 0.0))
    if accelerator.is_main_process:
        folder.mark(args.output_dir, {"--eval-only": True})
        summary = results.summary(args, run.data, run.model, found, classes, baseline)
        finish(run, run.model, processor, summary)


def finish(run: Run, model, processor: pt.MSamProcessor, summary: dict[str, Any]) -> None:
    """Write metrics.json, say what is in it, and draw some predictions."""
    args, picture = run.args, run.args.output_dir / "predictions.png"
    folder.write_json(args.output_dir / "metrics.json", summary)
    print(results.in_words(args, model, summary))
    tracking.log_results(run.accelerator, "final", summary["tasks"], summary["steps"])
    try:
        baseline = load_maps(args.output_dir / folder.BASELINE_MAPS) if args.baseline == "train" else None
        draw_predictions(model, processor, run.data.test, run.data.tasks, picture, {"decoders only": baseline})
        tracking.log_picture(run.accelerator, picture, summary["steps"])
    except Exception as error:
        print(f"{picture} could not be drawn: {error}", file=sys.stderr)
    print(f"everything is in {args.output_dir}")


def main(argv: list[str] | None = None, load: Callable[..., Data] = load_data) -> None:
    """Do what the options say; `load` gives the data, as [`load_data`] does."""
    args = options.parse_args(argv, __doc__.splitlines()[0])
    tracking.check_installed(args.report_to)
    if args.config:
        # at once, and not after the baseline
        check_config(args.method, args.rank, args.config)
    with Interruption() as interruption, contextlib.ExitStack() as stack:
        accelerator = make_accelerator(args)
        set_threads(accelerator, args.num_threads)
        claim = folder.claimed(args.output_dir, args.overwrite, args.resume)
        on_main_process(accelerator, lambda: stack.enter_context(claim))
        model = load_adapter(args) if args.init_from else None
        image_size = args.image_size or image_size_of(load_sam(args.base))
        with accelerator.main_process_first():
            data = check_data(args, load(args, image_size) if model is None else adapter_data(args, model, load))
        accelerator.init_trackers("peft_talora", config={name: str(value) for name, value in vars(args).items()})
        checkpoints = args.output_dir / folder.CHECKPOINTS
        run = Run(args, accelerator, data, interruption, args.method, "", checkpoints, model)
        (evaluate_only if args.eval_only else train_all)(run)
        # gloo's group can hang where it is destroyed while one of its threads still frees a tensor
        accelerator.wait_for_everyone()
        accelerator.end_training()


if __name__ == "__main__":
    sys.exit(run_script(main))
