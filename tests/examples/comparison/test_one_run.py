"""One run of a comparison: the split that is evaluated, and images that are labelled for one task each."""

from functools import partial

import pytest
import torch
import train_multitask as script
from accelerate import Accelerator
from comparison import one_run
from small_training import double_batch, gradients
from training.data import load_data
from training.options import parse_args

from peft_talora import MSamProcessor
from peft_talora.data import MultiTaskDataset

TASKS = ["semantic", "depth", "normals"]

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def load(*own):
    return partial(one_run.load, one_run.make_parser().parse_args(own))


@pytest.fixture
def args(arguments, data_folder):
    return lambda *more: parse_args(arguments("unused", "--dataset", data_folder, *more))


def test_one_label_each_takes_one_encoder_pass_each(trainer, data_folder, monkeypatch):
    model, rows = trainer("--dataset", data_folder, load=load("--one-task-each", *TASKS))
    specs = model.get_base_model().task_specs
    labelled = [
        [spec.task_kind.labelled(row["labels"][name][None], 255).any().item() for name, spec in specs.items()]
        for row in rows
    ]
    assert labelled == [[index % 3 == task for task in range(3)] for index in range(4)]
    accelerator, batch, actual = Accelerator(cpu=True), double_batch(rows), []
    for ids in (torch.tensor([0, 1, 2, 0]), None):
        model.zero_grad()
        assert torch.equal(script.only_labelled_tasks(specs, batch["labels"]), torch.tensor([0, 1, 2, 0]))
        monkeypatch.setattr(script, "only_labelled_tasks", lambda specs, labels, ids=ids: ids)
        losses = script.backward_joint(accelerator, model, batch, None)
        monkeypatch.undo()
        actual.append((losses, gradients(model)))
    assert actual[0][0] == pytest.approx(actual[1][0]) and actual[0][1].keys() == actual[1][1].keys()
    for name, gradient in actual[0][1].items():
        torch.testing.assert_close(gradient, actual[1][1][name], rtol=1e-9, atol=1e-12)


def test_images_without_a_wanted_label_are_left_out(args):
    wanted = args("--tasks", "depth")
    data = load("--one-task-each", "semantic", "depth")(wanted, 32)
    processor = MSamProcessor(32, data.tasks)
    everything = MultiTaskDataset(data.train, data.tasks, processor)
    some = data.make_dataset(data.train, data.tasks, processor)
    assert len(data.train) == 6 and len(some) == 3
    for index, row in enumerate((1, 3, 5)):
        for key in ("pixel_values", "original_size"):
            assert torch.equal(some[index][key], everything[row][key])
        assert torch.equal(some[index]["labels"]["depth"], everything[row]["labels"]["depth"])


def test_the_split(args):
    plain = load_data(args(), 32)
    on_test, on_validation = load()(args(), 32), load("--evaluate-on", "validation")(args(), 32)
    assert [len(data.test) for data in (plain, on_test, on_validation)] == [3, 3, 2]
    assert plain.identity == {} and on_validation.identity["--evaluate-on"] == "validation"


def test_a_task_without_an_image(args):
    with pytest.raises(ValueError, match="--one-task-each semantic: no image keeps its labels of 'depth'"):
        load("--one-task-each", "semantic")(args("--tasks", "semantic", "depth"), 32)


def test_other_options_go_to_the_training_script(monkeypatch):
    calls = []
    monkeypatch.setattr(one_run.train_multitask, "main", lambda argv, load: calls.append((argv, load)))
    one_run.main(["--steps", "3", "--one-task-each", "a", "b", "--seed=4"])
    assert calls[0][0] == ["--steps", "3", "--seed=4"]
    assert calls[0][1].args[0].one_task_each == ["a", "b"]
