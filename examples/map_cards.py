"""Maps over their picture as HTML: one card per task, with a legend. All pictures are in the HTML itself.

How much a map covers of the picture is the page's CSS variable ``--opacity``: it changes at once, without new pictures.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from html import escape
from io import BytesIO

import numpy as np
from legends import classes_shown, normals_ball, shows_directions
from PIL import Image
from predict import paint, thumbnail

from peft_talora import TaskSpec
from peft_talora.drawing import class_entries, color_range, draw, scale_ends

SHOWN_SIDE = 1024  # longest side of a picture on the page, in pixels
BAR_STEPS = 13  # colours of a bar's gradient; a multiple of what depth's colours lie between, and one

CSS = """
.maps { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 260px), 1fr)); gap: 14px; }
.maps figure { margin: 0; max-width: 480px; padding: 8px; border: 1px solid var(--border-color-primary); border-radius: 6px; }
.maps figcaption { margin-bottom: 6px; font-weight: 600; }
.maps .over { background: var(--picture) 0 0 / 100% 100%; border-radius: 3px; overflow: hidden; }
.maps .over img { display: block; width: 100%; opacity: var(--opacity); }
.maps .legend { display: flex; flex-wrap: wrap; gap: 2px 12px; margin-top: 8px; font-size: 13px; }
.maps .legend i { display: inline-block; width: 12px; height: 12px; margin-right: 5px; border: 1px solid #8888; }
.maps .bar { flex: 1 0 100%; height: 12px; border: 1px solid #8888; }
.maps .ends { flex: 1 0 100%; display: flex; justify-content: space-between; }
.maps .ball { display: grid; grid-template-columns: repeat(3, auto); place-items: center; margin: auto; gap: 2px 6px; }
.maps .ball img { width: 56px; border-radius: 50%; grid-area: 2 / 2; }
"""


def cards(image: np.ndarray, maps: Mapping[str, np.ndarray], specs: Mapping[str, TaskSpec]) -> str:
    """The maps of a picture side by side.

    Args:
        image: The picture, uint8 (H, W, 3).
        maps: {task: map} at its resolution; large ones are shown smaller.
        specs: {task: its TaskSpec}.
    """
    _, small, small_maps = thumbnail("", image, maps, SHOWN_SIDE)
    # the colours and legends are those of the whole maps, and so of the files
    body = "".join(_card(name, specs[name], values, small_maps[name]) for name, values in maps.items())
    return f'<div class="maps" style="--picture: url({data_uri(small, "JPEG")})">{body}</div>'


def layer(spec: TaskSpec, values: np.ndarray, limits: tuple[float, float] | None) -> np.ndarray:
    """A coloured map to lay over its picture, uint8 (H, W, 4); of a mask the rest is transparent."""
    color, cover = paint(spec, values, draw(spec, values, limits))
    return np.rint(np.concatenate([color, 255 * cover], axis=-1)).astype(np.uint8)


def data_uri(picture: np.ndarray, format: str = "PNG") -> str:
    """A picture as an address that holds all of it."""
    file = BytesIO()
    Image.fromarray(picture).save(file, format, quality=90, subsampling=0)
    return f"data:image/{format.lower()};base64,{b64encode(file.getvalue()).decode()}"


def _card(name: str, spec: TaskSpec, values: np.ndarray, small: np.ndarray) -> str:
    limits = color_range(spec, [values])
    picture = data_uri(layer(spec, small, limits))
    return (
        f'<figure data-task="{name}"><figcaption>{name}</figcaption>'
        f'<div class="over"><img src="{picture}" alt="the map {name}"></div>'
        f'<div class="legend">{_legend(spec, values, limits)}</div></figure>'
    )


def _legend(spec: TaskSpec, values: np.ndarray, limits: tuple[float, float] | None) -> str:
    if spec.task_kind.has_classes:
        return _classes(spec, values)
    if shows_directions(spec):
        sides = ((1, 2, "faces up"), (2, 1, "left"), (2, 3, "right"), (3, 2, "down"))
        words = "".join(f'<span style="grid-area: {row} / {column}">{word}</span>' for row, column, word in sides)
        return f'<div class="ball"><img src="{data_uri(normals_ball())}" alt="the colours of a ball">{words}</div>'
    scale = scale_ends(spec, limits)
    return "" if scale is None else _bar(spec, *scale)


def _classes(spec: TaskSpec, values: np.ndarray) -> str:
    """The classes that are seen, the most frequent first."""
    words = []
    for color, name in class_entries(spec, classes_shown(spec, [values])):
        patch = "" if color is None else f'<i style="background: {_css(color)}"></i>'
        words.append(f"<span>{patch}{escape(name)}</span>")
    return "".join(words)


def _bar(spec: TaskSpec, limits: tuple[float, float], what: str) -> str:
    steps = layer(spec, np.linspace(*limits, BAR_STEPS)[None], limits)[0]
    low, high = (f"{limit:.3g}" for limit in limits)
    return (
        f'<div class="bar" style="background: linear-gradient(to right, {", ".join(map(_css, steps))})"></div>'
        f'<div class="ends"><span>{low}</span><span>{what}</span><span>{high}</span></div>'
    )


def _css(color: np.ndarray) -> str:
    """A colour of three or four bytes."""
    return "#" + bytes(color.tolist()).hex()
