"""A page that shows the maps of trained adapters for pictures that are uploaded to it.

    python examples/demo.py --adapter runs/multitask

It needs Gradio (``pip install -e ".[demo]"``) and no network: what it loads, it loads from here. Read from top to bottom:
arguments, adapters, results, the page. Exit code: 2 where an adapter or the port cannot be used.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
import shutil
import signal
import sys
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from html import escape
from pathlib import Path

import extras  # noqa: F401

# isort: split
import numpy as np
import torch

# before Gradio is imported, which would tell its makers about every start
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
try:
    import gradio as gr
except ImportError:  # --help does without
    gr = None

import peft_talora as pt

sys.path.insert(0, str(Path(__file__).parent))
import map_cards
from picture_files import read_picture
from predict import (
    Unusable,
    adapter_folder,
    load_model,
    save_picture,
)
from prediction import VIEW_SIDE, make_picture, predict, shrink_image
from prediction_options import add_model_arguments, check_model_arguments

KEPT_RESULTS = 8
QUEUE = 32  # runs that wait; whoever comes then is told to try again
OPACITY = 0.6
DOWNLOAD = "Download the maps (ZIP)"
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
CSS = f"""
body {{ --opacity: {OPACITY}; }}
#maps .html-container {{ padding: 0; }}
.hint {{ margin-bottom: 8px; opacity: 0.7; }}
.message {{ padding: 12px; background: var(--error-background-fill); color: var(--error-text-color); }}
{map_cards.CSS}"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    parser.add_argument("--share", action="store_true", help="let others reach the page through Gradio's servers")
    args = parser.parse_args(argv)
    if args.port is not None and not 0 < args.port < 65536:
        parser.error(f"--port must be from 1 to 65535, got {args.port}")
    check_model_arguments(parser, args)
    return args


# --- Adapters -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adapter:
    """A loaded adapter on its SAM."""

    model: torch.nn.Module
    processor: pt.MSamProcessor
    specs: Mapping[str, pt.TaskSpec]


def load_adapters(given: Mapping[str, str], base: str | None, device: torch.device) -> dict[str, Adapter]:
    """{name: adapter}; one that was given without a name is called as its folder."""
    adapters = {}
    for name, path in given.items():
        folder = adapter_folder(path)
        model = load_model(folder, base, device)
        specs = model.get_base_model().task_specs
        adapters[name or Path(path).resolve().name] = Adapter(model, pt.MSamProcessor.from_model(model), specs)
    return adapters


# --- Results --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Result:
    """What the page shows of a picture, and the ZIP of its maps, which is written while the page is looked at."""

    page: str
    archive: Future[Path]


class Results:
    """The latest results, of all who look at the page: the model runs once per picture, adapter and tasks."""

    def __init__(
        self, adapters: Mapping[str, Adapter], folder: Path, kept: int = KEPT_RESULTS, max_megapixels: float = 64
    ) -> None:
        self.adapters = adapters
        self.folder = folder
        self.kept = kept
        self.max_megapixels = max_megapixels
        self._results: OrderedDict[tuple, Result] = OrderedDict()
        self._reading, self._lock = threading.Lock(), threading.Lock()
        self._packing: Future[Path] | None = None
        # one, for matplotlib's figures are not made for several threads
        self._packer = ThreadPoolExecutor(max_workers=1)

    def get(self, file: Path, adapter: str, tasks: list[str]) -> Result:
        """The result of a picture's file; ValueError, with a message for the user, where it cannot be read."""
        try:
            # unpacked one after the other: a small file may hold a large picture
            with self._reading:
                image = read_picture(file, self.max_megapixels)
        except ValueError as error:
            # where uploads lie is nobody's business
            raise ValueError(str(error).replace(str(file), file.name)) from error
        key = (file.name, image.shape, hashlib.sha256(image).digest(), adapter, *tasks)
        with self._lock:
            if key not in self._results:
                self._results[key] = self._predict(file, image, adapter, tasks)
            self._results.move_to_end(key)
            while len(self._results) > self.kept:
                self._results.popitem(last=False)
            return self._results[key]

    def _predict(self, file: Path, image: np.ndarray, adapter: str, tasks: list[str]) -> Result:
        # the maps of one picture at a time
        if self._packing is not None:
            wait([self._packing])
        chosen = self.adapters[adapter]
        specs = {task: chosen.specs[task] for task in tasks}
        picture = make_picture(file.name, file, image, chosen.processor)
        maps = dict(predict(chosen.model, [picture], tasks)[0])
        height, width = image.shape[:2]
        title = f'<p class="hint">{escape(file.name)}, {width} x {height} pixels, adapter {escape(adapter)}</p>'
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        name = file.stem.strip(".") or "picture"
        view = shrink_image(image, VIEW_SIDE)
        self._packing = self._packer.submit(pack, folder, name, view, maps, specs)
        result = Result(title + map_cards.cards(view, maps, specs), self._packing)
        # the files go when nobody waits for them any more
        weakref.finalize(result, shutil.rmtree, folder, ignore_errors=True)
        return result


def pack(folder: Path, name: str, image: np.ndarray, maps: Mapping, specs: Mapping[str, pt.TaskSpec]) -> Path:
    """A ZIP of the files that predict.py writes for a picture."""
    files = folder / "files"
    save_picture(files / name, name, image, maps, specs)
    archive = shutil.make_archive(str(folder / f"{name}-maps"), "zip", files)
    shutil.rmtree(files)
    return Path(archive)


# --- The page -------------------------------------------------------------------------------------------------------


def make_page(results: Results) -> gr.Blocks:
    adapters = results.adapters
    first = next(iter(adapters))

    def choose_tasks(adapter: str) -> gr.CheckboxGroup:
        names = list(adapters[adapter].specs)
        return gr.CheckboxGroup(names, value=names, label="Tasks", elem_id="tasks")

    # files that were uploaded or downloaded go after an hour
    with gr.Blocks(title="Maps of a picture", delete_cache=(600, 3600)) as page:
        gr.Markdown("# Maps of a picture\nUpload a picture, choose an adapter and its tasks, and run.")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                picture = gr.Image(
                    label="Picture", type="filepath", image_mode=None, sources=["upload", "clipboard"], height=260,
                    elem_id="picture",
                )  # fmt: skip
                # Gradio would open the file itself, and end in a traceback where it cannot
                picture.preprocess = lambda upload: upload and upload.path
                adapter = gr.Dropdown(list(adapters), value=first, label="Adapter", elem_id="adapter")
                tasks = choose_tasks(first)
                run = gr.Button("Run", variant="primary", elem_id="run")
            with gr.Column(scale=3, min_width=320):
                opacity = gr.Slider(0, 1, OPACITY, step=0.01, label="Opacity of the maps", elem_id="opacity")
                maps = gr.HTML('<p class="hint">The maps will be here.</p>', elem_id="maps", js_on_load=None)
                download = gr.DownloadButton(DOWNLOAD, interactive=False, elem_id="download")
        adapter.change(choose_tasks, adapter, tasks, api_visibility="private")
        result = gr.State(time_to_live=3600)
        shown = run.click(
            functools.partial(show, results), [picture, adapter, tasks], [maps, download, result], concurrency_limit=2,
            api_visibility="private",
        )  # fmt: skip
        # the files take longer than the maps, and whoever runs again does not want the old ones any more
        offered = shown.then(
            offer, result, download, concurrency_limit=8, trigger_mode="multiple", api_visibility="private"
        )
        run.click(None, cancels=[offered])
        # in the browser alone
        opacity.change(None, opacity, js="value => document.body.style.setProperty('--opacity', value)")
    return page


def show(
    results: Results, file: str | None, adapter: str, tasks: list[str]
) -> tuple[str, gr.DownloadButton, Result | None]:
    """What a run changes on the page: the maps or a message, the button for the download, and the result."""
    # of the adapter's tasks, for a quick hand can run before the page has changed them
    tasks = [task for task in results.adapters[adapter].specs if task in tasks]
    try:
        if not file or not tasks:
            raise ValueError("Choose at least one task." if file else "Upload a picture first.")
        result = results.get(Path(file), adapter, tasks)
    except ValueError as error:
        return message(str(error)), gr.DownloadButton(DOWNLOAD, value=None, interactive=False), None
    return result.page, gr.DownloadButton("Preparing the download ...", value=None, interactive=False), result


def offer(result: Result | None) -> gr.DownloadButton:
    """Let the files of a result be downloaded, as soon as they are there."""
    if result is None:
        return gr.skip()
    try:
        archive = result.archive.result()
    except Exception as error:
        print(f"the files of a download could not be written: {error!r}", file=sys.stderr, flush=True)
        return gr.DownloadButton("The files could not be written", value=None, interactive=False)
    return gr.DownloadButton(DOWNLOAD, value=str(archive), interactive=True)


def message(text: str) -> str:
    return f'<p class="message" role="alert">{escape(text)}</p>'


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if gr is None:
        print("error: the page is made with Gradio, which is not installed: pip install -e '.[demo]'", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            serve(args, Path(folder))
        except Unusable as error:
            print(f"error: {error}", file=sys.stderr)
            print("accelerate launch examples/train_multitask.py trains one, in runs/multitask", file=sys.stderr)
            return 2
        except (ValueError, TypeError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


def serve(args: argparse.Namespace, folder: Path) -> None:
    """Load the adapters and show the page until the process is interrupted."""
    adapters = load_adapters(args.adapters, args.base, args.device)
    page = make_page(Results(adapters, folder, max_megapixels=args.max_megapixels)).queue(max_size=QUEUE)
    _, address, public = page.launch(
        server_port=args.port, share=args.share, css=CSS, theme=gr.themes.Default(**FONTS), footer_links=[],
        ssr_mode=False, max_file_size="100mb", enable_monitoring=False, quiet=True, prevent_thread_lock=True,
    )  # fmt: skip
    print(f"The page is at {address}{f' and {public}' if public else ''}; Ctrl-C ends it.", flush=True)
    # the files of all uploads and results go then
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    page.block_thread()


if __name__ == "__main__":
    sys.exit(main())
