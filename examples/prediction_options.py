"""The options of predict.py, and those of them that demo.py has, too; they are checked before anything slow is imported."""

from __future__ import annotations

import argparse
from pathlib import Path

from bases import BASES, base_path


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Predict the maps of an adapter for your own pictures.")
    add = parser.add_argument
    add("images", nargs="+", type=Path, metavar="IMAGE_OR_FOLDER", help="folders are searched, with all below")
    add_model_arguments(parser)
    add("--output-dir", type=Path, default=Path("predictions"), help="with several adapters a folder for each in it")
    add("--tasks", nargs="+", help="default: all that the adapter has")
    add("--batch-size", type=int, default=4)
    add("--sheet-rows", type=int, default=64, help="pictures on the contact sheet at most, the first ones")
    add("--tile", action="store_true", help="predict tile by tile, each as large as the model's input, at the picture's own "
        "resolution: for aerial images and micrographs, not for scenes that have to be seen as a whole")  # fmt: skip
    add("--tile-side", type=int, help="side of a tile in pixels of the picture; default: the model's input")
    add("--overwrite", action="store_true", help="replace files in the output that no earlier prediction wrote, too")
    args = parser.parse_args(argv)
    if args.tile_side is not None and not args.tile:
        parser.error("--tile-side means something with --tile alone")
    for name in ("batch_size", "sheet_rows", "tile_side"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.output_dir.is_file():
        parser.error(f"--output-dir: {args.output_dir} is a file")
    check_model_arguments(parser, args)
    return args


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--adapter", action="append", metavar="[NAME=]PATH",
        help="a folder that training wrote, or a Hub id; repeat it for several adapters, each with its own tasks; "
        "default: runs/multitask")  # fmt: skip
    add("--base", help=f"the SAM: {', '.join(BASES)}, a path or a Hub id; default: the one the adapter was trained on")
    add("--max-megapixels", type=float, default=64, help="a picture with more pixels is not read; default: 64")
    add("--device", help="default: cuda where there is one, else cpu")


def check_model_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Make `args.device` a device that is there, and `args.adapters` a {name: path or Hub id}."""
    args.base = base_path(args.base)
    if not args.max_megapixels > 0:
        parser.error(f"--max-megapixels must be above 0, got {args.max_megapixels}")
    args.adapters = name_adapters(parser, args.adapter or ["runs/multitask"])
    # the last of all checks, since this import takes seconds
    import torch

    try:
        args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device: {error}")


def name_adapters(parser: argparse.ArgumentParser, given: list[str]) -> dict[str, str]:
    """{name: path or Hub id}. One adapter without a name gets the name "": its output needs no folder of its own."""
    adapters: dict[str, str] = {}
    for value in given:
        name, equals, path = value.partition("=")
        if not equals or Path(value).exists():
            name, path = Path(value).resolve().name if len(given) > 1 else "", value
        elif not name or not path or Path(name).name != name:
            parser.error(f"--adapter: expected PATH or NAME=PATH with a name that can be a folder's, got {value!r}")
        if name in adapters:
            parser.error(f"--adapter: {adapters[name]} and {path} are both called {name!r}: write NAME={path}")
        adapters[name] = path
    return adapters
