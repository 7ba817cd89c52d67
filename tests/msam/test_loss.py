"""The gradient of an optimiser step that several forwards share, against that of all its images in one forward."""

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from process_groups import run_in_processes
from small_models import label_maps, make_sam
from torch.nn.parallel import DistributedDataParallel

from peft_talora import MSamForMultiTask, TALoraConfig, TaskSpec
from peft_talora.losses import labelled_per_forward

TASKS = {
    "semantic": TaskSpec("semantic", num_channels=3),
    "depth": TaskSpec("depth", weight=0.5),
    "normals": TaskSpec("normals", weight=2.0),
}


def tuned():
    torch.manual_seed(0)
    msam = MSamForMultiTask.from_sam(make_sam().double(), TASKS)
    config = TALoraConfig(r=3, init_weights=False, ortho_reg_weight=0.1)
    return get_peft_model(msam, config, autocast_adapter_dtype=False).train()


def partly_labelled():
    """Six images: three with classes, all but one with depth, and only the last with normals."""
    pixels = torch.randn(6, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = label_maps(6)
    labels["semantic"][[0, 1, 4]] = -1
    labels["semantic"][2, :15] = 255  # an image with few labelled pixels counts as much as one with many
    labels["depth"][3] = 0
    labels["normals"][:5] = 0
    return {"pixel_values": pixels, "labels": labels}


def rows_of(batch, rows):
    """Some images of a batch."""
    part = {"pixel_values": batch["pixel_values"][rows], "labels": {n: v[rows] for n, v in batch["labels"].items()}}
    return part | {"task_ids": [batch["task_ids"][row] for row in rows]} if "task_ids" in batch else part


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


def assert_same(got, expected):
    assert got.keys() == expected.keys() and any(value.abs().max() > 1e-3 for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize(
    "parts", [[[0, 1, 2, 3, 4, 5]], [[0, 1, 2], [3, 4, 5]], [[0, 1], [5, 3], [4, 2]], [[0], [1, 2, 3, 4, 5]]]
)
def test_the_mean_of_the_gradients_is_that_of_the_whole(parts, with_ids):
    model, batch = tuned(), partly_labelled()
    if with_ids:
        batch["task_ids"] = ["depth", "depth", "semantic", "semantic", "depth", "normals"]
    whole = model(**batch)
    whole.loss.backward()
    expected = gradients(model)
    batches = [rows_of(batch, rows) for rows in parts]
    loss_divisors = labelled_per_forward(TASKS, batches)
    labelled = (2, 3, 1) if with_ids else (3, 5, 1)
    assert {name: value.item() for name, value in loss_divisors.items()} == {
        name: pytest.approx(number / len(parts)) for name, number in zip(TASKS, labelled, strict=True)
    }
    outputs = [model(**part, loss_divisors=loss_divisors) for part in batches]
    sum(output.loss / len(parts) for output in outputs).backward()
    assert_same(gradients(model), expected)
    for name, value in whole.losses.items():
        torch.testing.assert_close(sum(output.losses[name] for output in outputs) / len(parts), value)


def test_without_it_a_forward_divides_by_its_own_number():
    model, batch = tuned().eval(), partly_labelled()
    whole = model(**batch).losses["normals"]
    own = [model(**rows_of(batch, rows)).losses["normals"] for rows in ([0, 1, 2], [3, 4, 5])]
    assert own[0] == 0 and whole > 0.01
    torch.testing.assert_close(own[1], whole)  # one image of six, or of three
    given = model(**batch, loss_divisors=labelled_per_forward(TASKS, [batch]))
    assert given.losses["normals"] == whole


def test_nothing_labelled_anywhere():
    model, batch = tuned(), partly_labelled()
    batch["labels"]["normals"].zero_()
    del batch["labels"]["depth"]
    loss_divisors = labelled_per_forward(TASKS, [batch])
    assert loss_divisors["normals"] == loss_divisors["depth"] == 0
    output = model(**batch, loss_divisors=loss_divisors)
    assert output.losses["normals"] == output.losses["depth"] == 0
    output.loss.backward()
    assert not any(
        p.grad is None or p.grad.any() for n, p in model.named_parameters() if p.requires_grad and ".normals." in n
    )


def step_of_a_process(folder, parts):
    rank, model, batch = dist.get_rank(), tuned(), partly_labelled()
    parallel = DistributedDataParallel(model)
    batches = [rows_of(batch, rows) for rows in parts[rank]]
    loss_divisors = labelled_per_forward(TASKS, batches)
    with parallel.no_sync():
        for part in batches[:-1]:
            (parallel(**part, loss_divisors=loss_divisors).loss / len(batches)).backward()
    (parallel(**batches[-1], loss_divisors=loss_divisors).loss / len(batches)).backward()
    torch.save(gradients(model), f"{folder}/{rank}.pt")


@pytest.mark.parametrize("parts", [[[[0, 1, 2]], [[3, 4, 5]]], [[[0], [1, 5]], [[2, 3], [4]]]])
def test_two_processes(parts, tmp_path):
    model, batch = tuned(), partly_labelled()
    model(**batch).loss.backward()
    run_in_processes(step_of_a_process, tmp_path, parts, number=2)
    expected = gradients(model)
    for rank in range(2):
        assert_same(torch.load(tmp_path / f"{rank}.pt"), expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "got int"),
        ({"depth": 1, "normals": 1}, r"got \['depth', 'normals'\]"),
        ({"semantic": -1, "depth": 1, "normals": 1}, r"loss_divisors\['semantic'\] must be a number >= 0 .*, got -1"),
        ({"semantic": 1, "depth": float("nan"), "normals": 1}, r"loss_divisors\['depth'\] .*, got nan"),
        ({"semantic": 1, "depth": torch.ones(2), "normals": 1}, r"loss_divisors\['depth'\] .*, got tensor"),
    ],
)
def test_bad_numbers(given, message):
    with pytest.raises(ValueError, match=message):
        tuned()(**partly_labelled(), loss_divisors=given)


def test_no_forward():
    with pytest.raises(ValueError, match="at least one forward"):
        labelled_per_forward(TASKS, [])
