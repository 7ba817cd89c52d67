"""A kind of task that is added by one file, all the way: task, loss, metrics, labels, files, training, pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import make_sam

import peft_talora.kinds as kinds
from peft_talora import MSamForMultiTask, MSamProcessor, TALoraConfig, TaskSpec
from peft_talora.data import Augmentation, MultiTaskDataset, collate, detect_tasks, load_multitask_dataset
from peft_talora.drawing import UNLABELLED, color_range, draw
from peft_talora.losses import task_loss
from peft_talora.metrics import TaskMetrics, delta_b

EXAMPLES = Path(__file__).parents[2] / "examples"

FLOW = '''
"""Where every pixel goes, (x, y) in pixels."""

import numpy as np
import torch

from .kind import TaskKind
from .painting import fractions
from .regression import MeanErrors, absolute_error
from torchmetrics import MeanSquaredError


def draw(values, labelled, value_range):
    picture = np.full((*labelled.shape, 3), 7.0)
    picture[..., 0] = 255 * fractions(values[0], labelled, value_range)
    return picture


def encoding(value):
    if value not in ("plain", "kitti"):
        raise ValueError(f"expected plain or kitti, got {value!r}")
    return value


def from_numbers(values, numbers, num_channels):
    if numbers.own.get("encoding") == "kitti":
        values = np.where(values == 0, np.nan, (values - 32768.0) / 64)
    return values.astype(np.float32)


TASK_KINDS = {
    "flow": TaskKind(
        channels=2,
        layout="channels",
        labelled=lambda labels, ignore_index: torch.isfinite(labels).all(dim=-3),
        pixel_loss=absolute_error,
        metrics=lambda num_channels: MeanErrors(square_error=MeanSquaredError()),
        activation=lambda logits: logits,
        draw=draw,
        resample="mean",
        padding=np.nan,
        higher_is_better={"square_error": False},
        negated_by_flip=(0,),
        unit="pixels",
        own_fields={"encoding": encoding},
        from_numbers=from_numbers,
    )
}
'''


@pytest.fixture
def flow(tmp_path, monkeypatch):
    """The task, its file beside those of the package."""
    folder = tmp_path / "more_kinds"
    folder.mkdir()
    (folder / "flow.py").write_text(FLOW)
    monkeypatch.setattr(kinds, "__path__", [*kinds.__path__, str(folder)])
    before = dict(kinds.KINDS), dict(kinds.HIGHER_IS_BETTER)
    kinds.collect(kinds.__name__, kinds.__path__)
    yield TaskSpec("flow")
    for registered, content in zip((kinds.KINDS, kinds.HIGHER_IS_BETTER), before, strict=True):
        registered.clear()
        registered.update(content)


def flow_map(height=6, width=8):
    """To the right by the column's number, down by the row's; one pixel is not known."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    values = np.stack([x, y])
    values[:, 0, 0] = np.nan
    return values


@pytest.fixture
def folder(tmp_path):
    """Images with their flow as KITTI has it: 16 bits, 0 is unknown."""
    for name in ("images", "flow"):
        (tmp_path / "data" / name).mkdir(parents=True)
    numbers = np.nan_to_num(flow_map() * 64 + 32768, nan=0).astype(np.uint16)
    for index in range(2):
        Image.new("RGB", (8, 6), (index, 90, 200)).save(tmp_path / f"data/images/{index}.png")
        np.save(tmp_path / f"data/flow/{index}.npy", numbers)
    describe(tmp_path / "data", "kitti")
    return tmp_path / "data"


def describe(folder, encoding):
    (folder / "dataset.yaml").write_text(f"tasks: {{flow: {{kind: flow, encoding: {encoding}}}}}")


def test_the_kinds_that_there_are():
    assert list(kinds.KINDS) == ["semantic", "parts", "binary", "depth", "normals", "regression"]
    assert set(kinds.HIGHER_IS_BETTER) == {
        name for kind in kinds.KINDS.values() for name in kind.metrics(3)(*_one_pixel(kind))
    }


def _one_pixel(kind):
    if kind.layout == "map":
        return torch.tensor([1]), torch.tensor([1])
    return torch.ones(1, 3), torch.ones(1, 3)


def test_two_kinds_of_one_name_are_refused(flow, tmp_path, monkeypatch):
    (tmp_path / "more_kinds" / "again.py").write_text(FLOW)
    with pytest.raises(ValueError, match=r"again: there is another kind named 'flow'"):
        kinds.collect(kinds.__name__, kinds.__path__)


def test_loss_and_metrics(flow):
    labels = torch.from_numpy(flow_map())[None]
    logits = torch.zeros(1, 2, 6, 8)
    known = np.isfinite(flow_map())
    values = flow_map()[known].astype(np.float64)
    assert task_loss(flow, logits, labels).item() == pytest.approx(np.abs(values).mean())
    metrics = TaskMetrics(flow)
    metrics.update(logits, labels)
    assert metrics.compute() == pytest.approx({"square_error": (values**2).mean()})
    assert delta_b({"flow": {"square_error": 0.5}}, {"flow": {"square_error": 1.0}}) == 50


def test_from_files_to_a_trained_model(flow, folder):
    splits = load_multitask_dataset(f"folder:{folder}")
    tasks = detect_tasks(splits)
    assert tasks == {"flow": flow}
    rows = splits["train"]
    np.testing.assert_array_equal(rows[0]["flow"], flow_map())

    msam = MSamForMultiTask.from_sam(make_sam(), tasks)
    processor = MSamProcessor.from_model(msam)
    plain = MultiTaskDataset(rows, tasks, processor)
    label = plain[0]["labels"]["flow"]
    assert label.shape == (2, 32, 32) and label[:, 24:].isnan().all()
    flipped = MultiTaskDataset(rows, tasks, processor, augment=Augmentation((1.0,), 1.0))[0]["labels"]["flow"]
    mirrored = label.flip(-1) * torch.tensor([-1.0, 1.0])[:, None, None]
    torch.testing.assert_close(flipped, mirrored, equal_nan=True)

    from peft import get_peft_model

    model = get_peft_model(msam, TALoraConfig(r=2))
    batch = collate([plain[0], plain[1]])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    maps = msam.post_process(model(pixel_values=batch["pixel_values"]), [(6, 8), (6, 8)])
    assert maps[1]["flow"].shape == (2, 6, 8)


def test_a_field_that_only_this_kind_knows(flow, folder):
    describe(folder, "middlebury")
    with pytest.raises(ValueError, match=r"tasks\.flow\.encoding: expected plain or kitti, got 'middlebury'"):
        load_multitask_dataset(f"folder:{folder}")
    (folder / "dataset.yaml").write_text("tasks: {flow: {kind: flow, scale: 2}}")
    with pytest.raises(ValueError, match=r"unknown fields \['scale'\].*of a flow task.*'encoding'"):
        load_multitask_dataset(f"folder:{folder}")


def test_pictures(flow, tmp_path, monkeypatch):
    values = flow_map()
    assert color_range(flow, [values], (0, 100)) == (0, 7)
    picture = draw(flow, values, (0, 7))
    assert (picture[0, 0] == UNLABELLED).all() and picture[2, 7].tolist() == [255, 7, 7]
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from map_cards import cards
    from predict import save_picture

    image = np.zeros((6, 8, 3), np.uint8)
    save_picture(tmp_path / "out", "out", image, {"flow": values}, {"flow": flow})
    assert (np.array(Image.open(tmp_path / "out/flow.png")) == draw(flow, values, color_range(flow, [values]))).all()
    assert 'data-task="flow"' in cards(image, {"flow": values}, {"flow": flow})
