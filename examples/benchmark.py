"""Time and memory of the adapters beside what they are compared with.

    python examples/benchmark.py                                # every row; a few minutes on two CPU cores
    python examples/benchmark.py --only layer --json rows.json  # some of them, and as data

The variants of a row alternate in one process, so that a busy machine slows all of them. Shown are medians with
quartiles over the rounds, the most memory that a call holds at once beside its inputs, and the ratio that the row is
about. A row is one function that yields [`Row`]s; `ROWS` names them all.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import SamModel

import peft_talora as pt
from peft_talora.convlora.gate import choose

TINY_SAM = Path(__file__).parent / "tiny_sam"


@dataclass
class Row:
    """One comparison: the variants' seconds per round and peak bytes, and the ratio `of` : `to`.

    Where `minus` names a variant, its time is taken off both sides of the ratio, round by round.
    """

    name: str
    of: str
    to: str
    minus: str | None = None
    limit: float | None = None
    seconds: dict[str, list[float]] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)

    def ratios(self) -> list[float]:
        base = self.seconds[self.minus] if self.minus else [0.0] * len(self.seconds[self.of])
        sides = zip(self.seconds[self.of], self.seconds[self.to], base, strict=True)
        return [(of - minus) / (to - minus) for of, to, minus in sides]

    def ratio(self) -> float:
        """The ratio of the medians."""
        of, to = (statistics.median(self.seconds[name]) for name in (self.of, self.to))
        minus = statistics.median(self.seconds[self.minus]) if self.minus else 0.0
        return (of - minus) / (to - minus)

    def to_dict(self) -> dict:
        return {**asdict(self), "ratio": self.ratio(), "ratios": self.ratios()}


def measure(row: Row, variants: dict[str, Callable[[], None]], args: argparse.Namespace) -> Row:
    """Run the variants in turn: `args.rounds` rounds, or more until the row took `args.seconds`."""
    for call in variants.values():
        for _ in range(2):  # compiles, and warms caches and allocators
            call()
    row.peak_bytes = {name: peak_memory(call, args.device) for name, call in variants.items()}
    row.seconds = {name: [] for name in variants}
    started, round_ = time.perf_counter(), 0
    while round_ < args.rounds or time.perf_counter() - started < args.seconds:
        for name, call in variants.items():
            torch.manual_seed(round_)  # the variants of a round draw the same noise, hence the same experts
            synchronize(args.device)
            start = time.perf_counter()
            call()
            synchronize(args.device)
            row.seconds[name].append(time.perf_counter() - start)
        round_ += 1
    return row


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_memory(call: Callable[[], None], device: str) -> int:
    """The most bytes that a call holds at once, beside what was allocated before it."""
    if device == "cuda":
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


# --- What Conv-LoRA adds to a layer ------------------------------------------------------------------------------------


def plain_experts(z: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The experts as the paper writes them, expert by expert: resize, convolve, GELU, resize. z is (B, H, W, r)."""
    z = z.permute(0, 3, 1, 2)
    output = torch.zeros_like(z)
    for e in range(weight.shape[0]):
        rows = (index == e).nonzero().flatten()
        if len(rows) == 0:
            continue
        x = z[rows]
        if e > 0:
            x = F.interpolate(x, scale_factor=e + 1, mode="bicubic", align_corners=False)
        x = F.gelu(F.conv2d(x, weight[e], bias[e], padding=1))
        if e > 0:
            x = F.interpolate(x, size=z.shape[-2:], mode="bicubic", align_corners=False)
        output = output.index_copy(0, rows, x)
    return output.permute(0, 2, 3, 1)


def plain_layer(layer: pt.ConvLoraLinear, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer with the plain experts, all else being the same: (output, balancing loss)."""
    A, B, weight, bias, gate, noise = (getattr(layer, name)["default"] for name in layer.adapter_layer_names)
    z = F.linear(x, A)
    choice = choose(z.mean((1, 2)), gate, noise, noisy=True)
    hidden = (z + plain_experts(z, choice.index, weight, bias)) * layer.scaling["default"]
    result = torch.addmm(layer.base_layer(x).flatten(0, -2), hidden.flatten(0, -2), B.T.contiguous())
    return result.unflatten(0, x.shape[:-1]), 0.01 * choice.loss


def backward(outputs: tuple, inputs: list[torch.Tensor], cotangent: torch.Tensor) -> None:
    torch.autograd.grad(outputs, inputs, (cotangent, *(torch.ones_like(o) for o in outputs[1:])))


def layer_row(args: argparse.Namespace, name: str, shape: tuple, width: int, compiled: bool, limit: float) -> Row:
    """Forward and backward of a layer width -> `args.widening` width of a block in the middle of an encoder."""
    out = args.widening * width
    torch._dynamo.reset()
    wrap = functools.partial(torch.compile, dynamic=False) if compiled else (lambda function: function)
    base = nn.Sequential(nn.Linear(width, out)).requires_grad_(False)
    model = get_peft_model(base, pt.ConvLoraConfig(target_modules=["0"])).to(args.device).train()
    layer = model.base_model.model[0]
    nn.init.normal_(layer.convlora_B["default"])
    parameters = [p for p in layer.parameters() if p.requires_grad]
    x = torch.randn(*shape, width, device=args.device, requires_grad=True)
    cotangent = torch.randn(*shape, out, device=args.device)
    linear, ours = wrap(layer.base_layer), wrap(layer)

    def run_ours() -> None:
        backward((ours(x), layer.balancing_loss("default")), [x, *parameters], cotangent)

    variants = {
        "base": lambda: backward((linear(x),), [x], cotangent),
        "ours": run_ours,
        "plain": lambda: backward(plain_layer(layer, x), [x, *parameters], cotangent),
    }
    row = Row(name, "ours", "plain", minus="base", limit=limit)
    if compiled:
        # the dispatch by expert breaks its graph; the ratio is to the faster one
        plain = torch.compile(plain_layer)
        variants["plain compiled"] = lambda: backward(plain(layer, x), [x, *parameters], cotangent)
    measure(row, variants, args)
    row.to = min((n for n in variants if n.startswith("plain")), key=lambda n: statistics.median(row.seconds[n]))
    return row


def layers(args: argparse.Namespace) -> Iterator[Row]:
    """What Conv-LoRA adds to a layer, to what its plain form adds."""
    shapes = {"25 windows of 14x14": (25, 14, 14), "4 maps of 64x64": (4, 64, 64)}
    for width, compiled, limit in ((64, False, 0.45), (64, True, 0.30), (768, True, 0.55)):
        for name, shape in shapes.items():
            mode = "compiled" if compiled else "eager"
            title = f"layer, {name}, {width} -> {args.widening * width} channels, {mode}"
            yield layer_row(args, title, shape, width, compiled, limit)


# --- A training step ---------------------------------------------------------------------------------------------------


def sam_step(config, args: argparse.Namespace) -> Callable[[], None]:
    """A step of the small SAM itself, its adapter the only thing that is trained."""
    torch.manual_seed(0)
    model = get_peft_model(SamModel.from_pretrained(TINY_SAM), config).to(args.device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    pixels = torch.randn(8, 3, 128, 128, device=args.device)
    boxes = torch.tensor([[[20.0, 20.0, 90.0, 100.0]]] * 8, device=args.device)

    def step() -> None:
        masks = model(pixel_values=pixels, input_boxes=boxes, multimask_output=False).pred_masks
        loss = F.binary_cross_entropy_with_logits(masks, torch.ones_like(masks)) + pt.auxiliary_loss(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def msam_step(config, args: argparse.Namespace) -> Callable[[], None]:
    """A step of the training script: three tasks, their decoders and the encoder's norms trained, too."""
    torch.manual_seed(0)
    tasks = {name: pt.TaskSpec(name, 8 if name == "semantic" else None) for name in ("semantic", "depth", "normals")}
    msam = pt.MSamForMultiTask.from_sam(SamModel.from_pretrained(TINY_SAM), tasks)
    if isinstance(config, LoraConfig):
        config.modules_to_save = pt.default_modules_to_save(msam)
    model = get_peft_model(msam, config).to(args.device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    pixels = torch.randn(8, 3, 128, 128, device=args.device)
    labels = {
        "semantic": torch.randint(8, (8, 128, 128), device=args.device),
        "depth": torch.rand(8, 1, 128, 128, device=args.device) + 1,
        "normals": torch.randn(8, 3, 128, 128, device=args.device),
    }

    def step() -> None:
        loss = model(pixels, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def steps(args: argparse.Namespace) -> Iterator[Row]:
    """A whole training step with Conv-LoRA to one with PEFT's LoRA of the same rank."""
    for name, make in (("SAM", sam_step), ("mSAM, three tasks", msam_step)):
        variants = {
            "lora": make(LoraConfig(r=3, lora_alpha=32, target_modules=["qkv"]), args),
            "convlora": make(pt.ConvLoraConfig(r=3), args),
        }
        row = Row(f"training step, small {name}, batch 8, r=3", "convlora", "lora", limit=1.25)
        yield measure(row, variants, args)


ROWS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {"layer": layers, "step": steps}


def show(row: Row) -> None:
    print(f"\n{row.name}")
    for name, seconds in row.seconds.items():
        low, median, high = statistics.quantiles(seconds, n=4)
        print(f"  {name:16} {median * 1e3:9.2f} ms  ({low * 1e3:.2f} .. {high * 1e3:.2f})"
              f"  {row.peak_bytes[name] / 2**20:9.1f} MiB")  # fmt: skip
    low, _, high = statistics.quantiles(row.ratios(), n=4)
    minus = f", each minus {row.minus}" if row.minus else ""
    limit = f", to be at most {row.limit}" if row.limit else ""
    print(
        f"  {row.of} : {row.to}{minus} = {row.ratio():.3f}  (quartiles of the rounds {low:.3f} .. {high:.3f}{limit})"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=ROWS, help="rows to run; default: all")
    parser.add_argument("--rounds", type=int, default=11, help="rounds at least")
    parser.add_argument(
        "--seconds", type=float, default=15, help="how long a row lasts at least: short ones get more rounds"
    )
    parser.add_argument("--threads", type=int, help="threads on the CPU; default: torch's choice")
    parser.add_argument(
        "--widening", type=int, default=3, help="`layer`: outputs per input; 3 is a fused qkv, 1 a square layer"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="write the measurements to this file, too")
    args = parser.parse_args(argv)
    if args.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {args.rounds}")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    machine = {"torch": torch.__version__, "device": device, "threads": torch.get_num_threads()}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    rows = []
    for name in args.only or ROWS:
        for row in ROWS[name](args):
            show(row)
            rows.append(row.to_dict())
            if args.json:
                args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
