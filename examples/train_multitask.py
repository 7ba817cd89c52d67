"""Train one SAM for several dense tasks at once, and save the small adapter that makes the difference.

    accelerate launch examples/train_multitask.py

trains classes, depth and normals on rendered scenes from the small pretrained SAM beside this script, in a few minutes
on two CPU cores. Read from top to bottom: data, model, optimiser, loop, evaluation. `--help` lists what can be changed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from peft import LoraConfig, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import get_linear_schedule_with_warmup

import peft_talora as pt
from peft_talora.data import Augmentation, MultiTaskDataset, collate, detect_tasks, load_multitask_dataset
from peft_talora.metrics import HIGHER_IS_BETTER, MultiTaskMetrics
from peft_talora.msam.loading import load_sam

sys.path.insert(0, str(Path(__file__).parent))
from pictures import draw_predictions

METHODS = ("talora", "convlora", "lora", "decoder")
# learning rates of the adapter's own parameters (README, "What was measured"; that of convlora is not tuned)
ADAPTER_LR = {"talora": 2e-3, "convlora": 1e-3, "lora": 2e-3, "decoder": 0.0}
# the rank at which each method was published; that of lora is talora's
RANK = {"talora": 32, "convlora": 3, "lora": 32, "decoder": 1}
# the recipe's weights on NYUv2: the cosine loss of normals is small beside the others
TASK_WEIGHTS = {"normals": 4.0}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--base", default="tiny_sam", help="the SAM: tiny_sam, a path, or a Hub id such as facebook/sam-vit-base")
    add("--dataset", default="scenes", help="scenes (rendered here), a folder of parquet files, or a Hub id")
    add("--num-train", type=int, default=512, help="rendered scenes to train on")
    add("--num-test", type=int, default=64, help="rendered scenes to test on")
    add("--tasks", nargs="+", help="semantic depth normals saliency edges parts; default: all that have labels, "
        "for scenes the first three")  # fmt: skip
    add("--method", choices=METHODS, default="talora", help="lora is PEFT's own; decoder leaves the encoder alone")
    add("--rank", type=int, help="rank of the adapter; default: 32, for convlora 3")
    add("--init-weights", default=None, help="TALoraConfig.init_weights: lora, True, orthogonal or normalized")
    add("--task-pass", choices=("joint", "sequential"), default="joint",
        help="all tasks in one forward, or one after the other with less memory")  # fmt: skip
    add("--channel-mode", choices=("prompt", "token"), default="prompt")
    add("--image-size", type=int, help="side of the model's input in pixels; default: the base's own")
    add("--steps", type=int, default=200, help="optimiser steps")
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
    add("--num-workers", type=int, default=0, help="processes that load data")
    add("--output-dir", type=Path, default=Path("runs/multitask"))
    add("--checkpoint-every", type=int, help="steps between checkpoints; default: only the last step")
    add("--eval-every", type=int, help="steps between evaluations; default: only at the end")
    add("--baseline", help="what Delta_b compares with: a metrics.json, 'train' (decoder-only training at equal steps "
        "first) or 'none'; default: train for scenes, none otherwise")  # fmt: skip
    add("--report-to", choices=("none", "tensorboard", "trackio"), default="none")
    args = parser.parse_args(argv)
    args.rank = RANK[args.method] if args.rank is None else args.rank
    for name in ("steps", "batch_size", "grad_accumulation", "rank", "num_train", "num_test"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.base == "tiny_sam":
        args.base = str(Path(__file__).parent / "tiny_sam")
    if args.baseline is None:
        args.baseline = "train" if args.dataset == "scenes" and args.method != "decoder" else "none"
    if args.baseline not in ("train", "none") and not Path(args.baseline).is_file():
        parser.error(f"--baseline: there is no file {args.baseline}")
    return args


# --- Data -----------------------------------------------------------------------------------------------------------


def load_data(args: argparse.Namespace, image_size: int):
    """Rows to train on, rows to test on, and the tasks."""
    if args.dataset == "scenes":
        from scenes import CLASSES, load_scenes

        splits = {name: load_scenes(name, num, size=image_size, seed=0) for name, num in
                  (("train", args.num_train), ("test", args.num_test))}  # fmt: skip
        tasks = detect_tasks(splits["train"], args.tasks or ["semantic", "depth", "normals"], {"semantic": CLASSES})
    else:
        splits = load_multitask_dataset(args.dataset)
        tasks = detect_tasks(splits, args.tasks)
    test = next((splits[name] for name in ("test", "validation", "val") if name in splits), None)
    if test is None:
        print("The dataset has no test split: the evaluation is on the images it is trained on.")
        test = splits["train"]
    total = sum(TASK_WEIGHTS.get(name, 1.0) for name in tasks)
    for name, spec in tasks.items():
        spec.weight = TASK_WEIGHTS.get(name, 1.0) / total
    return splits["train"], test, tasks


def make_loader(rows, tasks, processor, args, augment=None) -> DataLoader:
    dataset = MultiTaskDataset(rows, tasks, processor, augment=augment, seed=args.seed)
    return DataLoader(
        dataset,
        batch_size=min(args.batch_size, len(dataset)),
        shuffle=augment is not None,
        drop_last=augment is not None,
        collate_fn=collate,
        num_workers=args.num_workers,
    )


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
    decoders = [name for name in saved if not name.startswith("vision_encoder")]
    return get_peft_model(msam, LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=decoders))


def make_optimizer(model, args: argparse.Namespace, method: str) -> torch.optim.Optimizer:
    """Three learning rates: decoders, their no-mask embeddings, and what changes the encoder.

    All channels of a task start alike, and only their embeddings tell them apart: those have to move first.
    """
    adapter_lr = ADAPTER_LR[method] if args.lr is None else args.lr
    rates = {
        "mask_decoders.": args.decoder_lr,
        "no_mask_embeds.": args.embedding_lr,
        ".layer_norm": args.norm_lr,
        "vision_encoder.": adapter_lr,
    }
    groups = {part: {"params": [], "lr": rate} for part, rate in rates.items()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[next(part for part in rates if part in name)]["params"].append(parameter)
    return torch.optim.AdamW([g for g in groups.values() if g["params"]], weight_decay=args.weight_decay)


# --- Training -------------------------------------------------------------------------------------------------------


def backward_joint(accelerator: Accelerator, model, batch) -> dict[str, float]:
    """All tasks in one forward."""
    output = model(**batch)
    accelerator.backward(output.loss)
    return {name: loss.item() for name, loss in output.losses.items()}


def backward_sequential(accelerator: Accelerator, model, batch) -> dict[str, float]:
    """One task after the other: the same gradients, with the memory of one task."""
    specs = accelerator.unwrap_model(model).get_base_model().task_specs
    losses = {}
    # the passes use different decoders, so that gradients are averaged over the processes by hand afterwards
    with accelerator.no_sync(model):
        for name in specs:
            output = model(pixel_values=batch["pixel_values"], tasks=[name], labels=batch["labels"])
            # the auxiliary loss belongs to the step, not to every pass
            is_last = len(losses) == len(specs) - 1
            accelerator.backward(output.loss if is_last else specs[name].weight * output.losses[name])
            losses[name] = output.losses[name].item()
    if accelerator.num_processes > 1 and accelerator.sync_gradients:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad = accelerator.reduce(parameter.grad, "mean")
    return losses


def endless(loader: DataLoader):
    """Batches of epoch after epoch, each with its own order and augmentation."""
    epoch = 0
    while True:
        loader.dataset.set_epoch(epoch)
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        yield from loader
        epoch += 1


def train(accelerator: Accelerator, args: argparse.Namespace, method: str, data, output_dir: Path | None):
    """Train one method and evaluate it: (PeftModel, processor, {task: {metric: value}}, seconds)."""
    train_rows, test_rows, tasks = data
    set_seed(args.seed)
    msam = pt.MSamForMultiTask.from_sam(args.base, tasks, args.image_size, args.channel_mode)
    model = add_adapter(msam, args, method)
    if args.gradient_checkpointing:
        # the newer name where there is one: transformers drops the older one in version 6
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    processor = pt.MSamProcessor.from_model(msam)
    loader = make_loader(train_rows, tasks, processor, args, augment=Augmentation())
    test_loader = make_loader(test_rows, tasks, processor, args)
    optimizer = make_optimizer(model, args, method)
    warmup = max(1, round(0.05 * args.steps))
    # the scheduler of accelerate steps once per process
    scheduler = get_linear_schedule_with_warmup(
        optimizer, warmup * accelerator.num_processes, args.steps * accelerator.num_processes
    )
    model, optimizer, scheduler, loader, test_loader = accelerator.prepare(
        model, optimizer, scheduler, loader, test_loader
    )
    model.train()
    batches, step, started = endless(loader), 0, time.perf_counter()
    backward = backward_joint if args.task_pass == "joint" else backward_sequential
    progress = tqdm(total=args.steps, desc=method, disable=not accelerator.is_local_main_process)
    while step < args.steps:
        with accelerator.accumulate(model):
            losses = backward(accelerator, model, next(batches))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        step += 1
        progress.update()
        progress.set_postfix({name: f"{loss:.3f}" for name, loss in losses.items()})
        accelerator.log({f"{method}/loss/{name}": loss for name, loss in losses.items()}, step=step)
        if method == "convlora" and args.report_to != "none":
            accelerator.log(usage_shares(accelerator.unwrap_model(model)), step=step)
        if output_dir and (step == args.steps or (args.checkpoint_every and step % args.checkpoint_every == 0)):
            save_checkpoint(
                accelerator, model, optimizer, scheduler, step, output_dir / "checkpoints" / f"step-{step}"
            )
        if args.eval_every and step % args.eval_every == 0 and step < args.steps:
            results = evaluate(accelerator, model, test_loader, tasks)
            accelerator.log({f"{method}/{t}/{m}": v for t, r in results.items() for m, v in r.items() if v is not None},
                            step=step)  # fmt: skip
            accelerator.print("\n" + table({f"step {step}": results}))
            model.train()
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


def save_checkpoint(accelerator: Accelerator, model, optimizer, scheduler, step: int, directory: Path) -> None:
    """The adapter and what training needs to go on; the base model is not written again."""
    if accelerator.is_main_process:
        pt.save_adapter(accelerator.unwrap_model(model), directory)
        state = {"step": step, "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
        torch.save({**state, "rng": torch.get_rng_state()}, directory / "training_state.pt")
    accelerator.wait_for_everyone()


# --- Evaluation -----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(accelerator: Accelerator, model, loader: DataLoader, tasks) -> dict[str, dict[str, float | None]]:
    """{task: {metric: value}} over all test images of all processes; None where nothing is labelled."""
    model.eval()
    metrics = MultiTaskMetrics(tasks).to(accelerator.device)
    for batch in tqdm(loader, desc="evaluation", leave=False, disable=not accelerator.is_local_main_process):
        metrics.update(model(pixel_values=batch["pixel_values"]).logits, batch["labels"])
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


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.grad_accumulation,
        # padding the last batch would count its images twice in the metrics
        dataloader_config=DataLoaderConfiguration(even_batches=False, use_seedable_sampler=True),
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=args.output_dir,
    )
    accelerator.init_trackers("peft_talora", config={k: str(v) for k, v in vars(args).items()})
    args.output_dir.mkdir(parents=True, exist_ok=True)
    image_size = args.image_size or load_sam(args.base).config.vision_config.image_size
    with accelerator.main_process_first():
        data = load_data(args, image_size)

    baseline = None
    if args.baseline == "train":
        baseline = train(accelerator, args, "decoder", data, None)[2]
    elif args.baseline != "none":
        baseline = read_baseline(args.baseline)
    model, processor, results, seconds = train(accelerator, args, args.method, data, args.output_dir)

    if accelerator.is_main_process:
        pt.save_adapter(model, args.output_dir, metrics=results)
        processor.save_pretrained(args.output_dir)
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
    (args.output_dir / "metrics.json").write_text(json.dumps(summary, indent=2) + "\n")
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
