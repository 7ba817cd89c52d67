"""Runs that end before their time, or begin where something lies already: nothing is lost."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import train_multitask as script
from safetensors.torch import load_file
from training import checkpoints
from training.stopping import Diverged, Interrupted

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_accelerator")]


@pytest.fixture
def options(data_folder):
    """Of a short run on data that need not be rendered."""
    return [
        "--dataset",
        data_folder,
        "--tasks",
        "depth",
        "--steps",
        "4",
        "--batch-size",
        "2",
        "--checkpoint-every",
        "1",
    ]


@pytest.fixture
def at_step(monkeypatch):
    """``at_step(n, do)``: have `do(model)` called before the n-th optimiser step of a run."""

    def patch(number, do):
        train_step, count = script.train_step, iter(range(1, 1000))

        def step(accelerator, args, model, *more):
            if next(count) == number:
                do(model)
            return train_step(accelerator, args, model, *more)

        monkeypatch.setattr(script, "train_step", step)

    yield patch


def files(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in Path(directory).rglob("*") if path.is_file()
    }


def steps(output, name="checkpoints"):
    return [step for step, _ in checkpoints.list_checkpoints(Path(output) / name)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_its_step_and_goes_on_bit_for_bit(
    run, arguments, options, tmp_path, at_step, number, monkeypatch
):
    options = [*options, "--checkpoint-every", "4"]
    run(tmp_path / "whole", *options)
    with monkeypatch.context():
        at_step(2, lambda model: os.kill(os.getpid(), number))
        with pytest.raises(
            Interrupted, match=rf"{number.name}: .*step-2 is complete; .*--resume latest resumes it"
        ) as error:
            script.main(arguments(tmp_path / "stopped", *options))
        assert error.value.received == number
        assert steps(tmp_path / "stopped") == [2] and not (tmp_path / "stopped/adapter_model.safetensors").exists()
    monkeypatch.undo()
    run(tmp_path / "stopped", *options, "--resume", "latest")
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("stopped", "whole")]
    assert weights[0] == weights[1]


def test_numbers_that_are_not_finite_stop_the_run_and_leave_what_was_good(run, arguments, options, tmp_path, at_step):
    run(tmp_path, *options)
    former = {
        name: content for name, content in files(tmp_path).items() if name.startswith(("adapter", "metrics", "README"))
    }

    def spoil(model):
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if "mask_decoders.depth" in name and p.requires_grad).fill_(
                torch.nan
            )

    at_step(3, spoil)
    with pytest.raises(
        Diverged, match=r"talora, step 3: the loss of depth is nan\. .*last good checkpoint is .*step-2"
    ):
        script.main(arguments(tmp_path, *options))
    assert steps(tmp_path) == [1, 2] and former.items() <= files(tmp_path).items()
    state = torch.load(tmp_path / "checkpoints/step-2/training_state.pt", weights_only=True)
    moments = [tensor for values in state["optimizer"]["state"].values() for tensor in values.values()]
    assert all(tensor.isfinite().all() for tensor in moments)


def test_weights_that_are_not_finite_are_not_saved(arguments, options, tmp_path, monkeypatch):
    """The last step's own: no loss has seen them yet."""
    update = script.update

    def spoil(accelerator, model, *more):
        update(accelerator, model, *more)
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).fill_(torch.inf)

    monkeypatch.setattr(script, "update", spoil)
    with pytest.raises(
        Diverged, match=r"step 1: the trained weights are not finite any more.*there is no checkpoint yet"
    ):
        script.main(arguments(tmp_path, *options, "--steps", "1"))
    assert not (tmp_path / "adapter_model.safetensors").exists() and steps(tmp_path) == []


def test_a_full_disk_costs_checkpoints_but_not_the_run(run, options, tmp_path, monkeypatch, capsys):
    save = torch.save
    full = iter([False, True, True, False])

    def sometimes(*given):
        if next(full):
            raise RuntimeError(
                "[enforce fail at inline_container.cc:659] . unexpected pos 64 vs 0; No space left on device"
            )
        save(*given)

    monkeypatch.setattr(torch, "save", sometimes)
    run(tmp_path, *options)
    assert steps(tmp_path) == [1, 4]
    told = capsys.readouterr().err
    for step in (2, 3):
        assert f"checkpoint {tmp_path / 'checkpoints' / f'step-{step}'} could not be written" in told
    assert "MB left; the checkpoints before it stay, and training continues" in told


def test_the_adapter_is_saved_before_it_is_evaluated(arguments, options, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(script, "measure", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        script.main(arguments(tmp_path, *options))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    last = load_file(tmp_path / "checkpoints/step-4/adapter_model.safetensors")
    assert saved.keys() == last.keys() and all(torch.equal(saved[name], last[name]) for name in last)


def test_a_picture_that_cannot_be_drawn_does_not_take_the_numbers_along(run, options, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise ValueError("no such font")

    monkeypatch.setattr(script, "draw_predictions", fail)
    metrics = run(tmp_path, *options)
    assert metrics["tasks"]["depth"]["abs_err"] > 0
    assert "predictions.png could not be drawn: no such font" in capsys.readouterr().err


class TestFolders:
    def test_what_is_not_ours_stays(self, run, arguments, options, tmp_path):
        for name in ("README.md", "baseline.json", "checkpoints/step-1/weights.bin", "checkpoints.old/notes.txt"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("mine")
        before = files(tmp_path)
        for more in ([], ["--resume", "latest"]):
            with pytest.raises(FileExistsError, match=r"no run of this script wrote .*--overwrite"):
                script.main(arguments(tmp_path, *options, *more))
            assert files(tmp_path) == before
        run(tmp_path, *options, "--overwrite")
        after = files(tmp_path)
        # the card and the baseline have names of ours; nothing else is lost
        assert {name for name in before if after.get(name) != b"mine"} == {
            "README.md",
            "baseline.json",
            "checkpoints/step-1/weights.bin",
        }
        assert after["checkpoints.old-2/step-1/weights.bin"] == after["baseline.json.old-2"] == b"mine"

    def test_restarts_keep_every_run_and_name_the_one_before(self, run, options, tmp_path, capsys):
        for number in ("3", "2", "1"):
            run(tmp_path, *options, "--steps", number)
        assert [steps(tmp_path, name) for name in ("checkpoints.old", "checkpoints.old-2", "checkpoints")] == [
            [1, 2, 3],
            [1, 2],
            [1],
        ]
        assert "are now in" in capsys.readouterr().out
        run(tmp_path, *options, "--steps", "1", "--resume", "latest")
        assert f"--resume {tmp_path / 'checkpoints.old-2/step-2'} resumes its last" in capsys.readouterr().out

    def test_a_run_that_goes_on_from_elsewhere_leaves_the_one_that_is_here(self, run, options, tmp_path):
        run(tmp_path / "a", *options)
        run(tmp_path / "b", *options)
        run(tmp_path / "b", *options, "--resume", str(tmp_path / "a/checkpoints/step-3"), "--keep-checkpoints", "1")
        assert steps(tmp_path / "b", "checkpoints.old") == [2, 3, 4] and steps(tmp_path / "b") == [4]
        names = [json.loads((tmp_path / d / "run.json").read_text())["run"] for d in ("a", "b")]
        assert names[0] != names[1]

    def test_the_same_run_keeps_its_name(self, run, options, tmp_path):
        run(tmp_path, *options)
        name = json.loads((tmp_path / "run.json").read_text())["run"]
        shutil.rmtree(tmp_path / "checkpoints/step-4")
        run(tmp_path, *options, "--resume", "latest")
        assert json.loads((tmp_path / "run.json").read_text())["run"] == name
        record = json.loads((tmp_path / "checkpoints/step-4/checkpoint.json").read_text())
        assert record["run"] == name and record["arguments"]["--steps"] == 4


def test_a_finished_run_may_get_more_steps(run, options, tmp_path, capsys):
    run(tmp_path, *options, "--baseline", "train", "--steps", "2")
    metrics = run(tmp_path, *options, "--baseline", "train", "--steps", "4", "--resume", "latest")
    assert metrics["steps"] == 4 and steps(tmp_path)[-1] == 4
    # equal steps for what it is compared with
    assert json.loads((tmp_path / "baseline.json").read_text())["arguments"]["--steps"] == 4
    assert "it had 2 steps to do, now 4" in capsys.readouterr().out
    state = torch.load(tmp_path / "checkpoints/step-4/training_state.pt", weights_only=True)
    assert state["scheduler"]["last_epoch"] == 4 and state["scheduler"]["_last_lr"] == pytest.approx([0.0] * 4)


def test_the_picture_shows_the_baseline_of_this_run(run, options, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(script, "draw_predictions", lambda *arguments: given.append(arguments[-1]["decoders only"]))
    run(tmp_path, *options)
    run(tmp_path, *options, "--baseline", "train")
    # the baseline was finished earlier
    run(tmp_path, *options, "--baseline", "train", "--resume", "latest")
    (tmp_path / "baseline_maps.npz").unlink()
    run(tmp_path, *options, "--baseline", "train", "--resume", "latest")
    none, first, resumed, lost = given
    assert none is lost is None and len(first) == len(resumed) == 3
    assert all(
        (a["depth"] == b["depth"]).all() and a["depth"].shape == (32, 32) for a, b in zip(first, resumed, strict=True)
    )
