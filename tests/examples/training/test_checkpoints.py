"""Checkpoints: complete or not there, checked when read, of the same run only."""

import os
import random
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from peft import get_peft_model
from training import checkpoints
from training.checkpoints import find_checkpoint, list_checkpoints, save_checkpoint
from training.folder import NotWritten

from peft_talora import MSamForMultiTask, TALoraConfig

ARGUMENTS = {"--seed": 3, "--tasks": ["depth"], "--lr": None}
# what a save does to the file system, as the interpreter reports it
FILE_EVENTS = (
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.chmod",
    "shutil.rmtree",
    "tempfile.mkdtemp",
)


@pytest.fixture
def model(sam):
    return get_peft_model(MSamForMultiTask.from_sam(sam, {"depth": {"kind": "depth"}}), TALoraConfig(r=2, r_task=1))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def save(model, folder):
    """``save(step, keep=...)``: a checkpoint whose state and U3 hold the step."""

    def write(step, keep=9, run="run"):
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if "talora_U3" in name).fill_(step)
        return save_checkpoint(folder, step, model, {"seconds": float(step)}, ARGUMENTS, keep, run)

    return write


def steps(folder):
    return [step for step, _ in list_checkpoints(folder)]


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_what_was_saved_is_found_and_loaded(save, model, folder):
    save(1)
    directory = save(10)
    saved = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    save(9)
    found = find_checkpoint("latest", folder, ARGUMENTS)
    assert (found.step, found.directory, found.training_state()) == (10, directory, {"seconds": 10.0})
    found.load_adapter(model)
    for name, parameter in model.named_parameters():
        if name in saved:
            assert torch.equal(parameter, saved[name]), name
    assert find_checkpoint(str(folder / "step-1"), folder, ARGUMENTS).step == 1
    assert find_checkpoint(None, folder, ARGUMENTS) is None


def test_a_checkpoint_is_the_adapter_and_little_more(save, model):
    directory = save(1)
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    weights = (directory / checkpoints.WEIGHTS_FILE).stat().st_size
    assert trained < weights < sum(p.numel() * p.element_size() for p in model.parameters())
    loaded = MSamForMultiTask.from_adapter(directory, base_model=model.unload())
    assert all(torch.all(p == 1) for name, p in loaded.named_parameters() if "talora_U3" in name)


def test_the_adapter_must_be_the_models(save, folder, sam):
    save(1)
    other = get_peft_model(MSamForMultiTask.from_sam(sam, {"edges": {"kind": "binary"}}), TALoraConfig(r=2, r_task=1))
    with pytest.raises(ValueError, match=r"step-1: the checkpoint or the model has no tensor 'base_model\..*depth"):
        find_checkpoint("latest", folder, ARGUMENTS).load_adapter(other)


def test_a_scaling_that_another_version_chose(save, folder, sam):
    save(1)
    tasks = {"depth": {"kind": "depth"}}
    other = get_peft_model(MSamForMultiTask.from_sam(sam, tasks), TALoraConfig(r=2, r_task=1, scaling=2.0))
    before = other.state_dict()["base_model.model.vision_encoder.layers.0.attn.qkv.talora_U3.default"].clone()
    with pytest.raises(ValueError, match=r"step-1: the adapter was begun with scaling=0\.5, now 2\.0: resume it with"):
        find_checkpoint("latest", folder, ARGUMENTS).load_adapter(other)
    after = other.state_dict()["base_model.model.vision_encoder.layers.0.attn.qkv.talora_U3.default"]
    assert torch.equal(after, before)


def test_the_last_are_kept(save, folder):
    for step in (2, 4, 6, 8, 10):
        save(step, keep=3)
    assert steps(folder) == [6, 8, 10]
    # resumed from an earlier one: those that lie ahead stay, until their turn comes
    save(7, keep=1)
    assert steps(folder) == [7, 8, 10]
    save(8, keep=2)
    assert steps(folder) == [7, 8, 10]
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_other_files_are_no_checkpoints(save, folder):
    save(3)
    for name in ("step-x", ".step-9", "step-9.old"):
        (folder / name).mkdir()
    assert steps(folder) == [3]


@pytest.mark.parametrize("name", [checkpoints.WEIGHTS_FILE, checkpoints.STATE_FILE, "adapter_config.json"])
@pytest.mark.parametrize(
    "damage", [flip_a_bit, os.remove, lambda path: os.truncate(path, 20)], ids=["bit", "gone", "cut"]
)
def test_damaged_one_is_named_and_skipped(save, folder, name, damage):
    save(1)
    directory = save(2)
    damage(directory / name)
    messages = []
    assert find_checkpoint("latest", folder, ARGUMENTS, messages.append).step == 1
    assert str(directory / name) in messages[0] and "damaged" in messages[0] and "step-1" in messages[1]
    with pytest.raises(ValueError, match=r"step-2.* (is not what was written|is missing)"):
        find_checkpoint(str(directory), folder, ARGUMENTS)


def test_damaged_record(save, folder):
    save(1)
    for step, text in enumerate(["", "[]", '{"step": 2}', '{"step": 5, "arguments": {}, "sha256": {}}'], start=2):
        (save(step) / checkpoints.RECORD_FILE).write_text(text)
    messages = []
    assert find_checkpoint("latest", folder, ARGUMENTS, messages.append).step == 1
    assert len(messages) == 5


def test_a_damaged_one_is_written_again(save, folder):
    flip_a_bit(save(2) / checkpoints.STATE_FILE)
    save(2)
    assert find_checkpoint("latest", folder, ARGUMENTS).step == 2


def test_no_checkpoint_yet(folder):
    messages = []
    assert find_checkpoint("latest", folder, ARGUMENTS, messages.append) is None
    assert str(folder) in messages[0] and "from the beginning" in messages[0]


def test_a_path_without_a_checkpoint(save, folder, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"--resume .*nowhere is no checkpoint.*there is none in .*checkpoints"
    ):
        find_checkpoint(str(tmp_path / "nowhere"), folder, ARGUMENTS)
    save(4)
    with pytest.raises(FileNotFoundError, match=r"no file checkpoint.json; those of this run are .*step-4"):
        find_checkpoint(str(folder), folder, ARGUMENTS)


def test_other_arguments(save, folder):
    save(4)
    given = {"--seed": 4, "--tasks": ("depth",), "--rank": 8}
    with pytest.raises(ValueError, match=r"step-4.*--seed: given 4, saved 3; --rank: given 8, saved None$"):
        find_checkpoint("latest", folder, given)


def test_more_steps_are_no_other_arguments(save, folder):
    save(4)
    with pytest.raises(ValueError, match=r"--steps: given 9, saved None"):
        find_checkpoint("latest", folder, ARGUMENTS | {"--steps": 9})
    saved = ARGUMENTS | {"--steps": 9}
    checkpoints.check_arguments(saved, ARGUMENTS | {"--steps": 10}, folder)
    with pytest.raises(ValueError, match=r"--steps: given 8, saved 9"):
        checkpoints.check_arguments(saved, ARGUMENTS | {"--steps": 8}, folder)
    with pytest.raises(ValueError, match=r"--seed: given 4, saved 3$"):
        checkpoints.check_arguments(saved, saved | {"--steps": 10, "--seed": 4}, folder)


def test_those_of_other_runs_are_never_removed(save, folder):
    for step in (1, 2, 3):
        save(step, run="first")
    for step in (2, 4, 6, 8):
        save(step, keep=2, run="second")
    assert steps(folder) == [1, 3, 6, 8]
    # one of the first run was in the way of the second's step 2
    assert {path.name for path in folder.iterdir()} == {"step-1", "step-3", "step-6", "step-8", "step-2.old-1"}
    assert '"run": "first"' in (folder / "step-2.old-1" / checkpoints.RECORD_FILE).read_text()


def test_a_folder_that_is_no_checkpoint_is_kept(save, folder):
    (folder / "step-2").mkdir(parents=True)
    (folder / "step-2" / "mine.bin").write_text("mine")
    save(2)
    assert (folder / "step-2.old-1" / "mine.bin").read_text() == "mine"
    assert find_checkpoint("latest", folder, ARGUMENTS).step == 2


@pytest.mark.parametrize("where", ["torch.save", "pt.save_adapter"])
def test_a_full_disk_leaves_what_was_there(save, folder, monkeypatch, where):
    """torch and safetensors have errors of their own for it."""
    save(1)
    save(2)
    error = RuntimeError if where == "torch.save" else checkpoints.SafetensorError

    def full(*_, **__):
        raise error("No space left on device (os error 28)")

    monkeypatch.setattr(f"training.checkpoints.{where}", full)
    for step in (2, 3):
        with pytest.raises(
            NotWritten, match=rf"checkpoint .*step-{step} .*No space left.* the disk at /.* has .* MB of"
        ):
            save(step, keep=1)
    assert steps(folder) == [1, 2] and find_checkpoint("latest", folder, ARGUMENTS).step == 2
    assert not list(folder.glob(".*"))


def test_random_numbers_go_on(tmp_path):
    def draw():
        return [random.random(), np.random.normal(), torch.randn(3).tolist()]

    np.random.normal()  # numpy keeps the second number of a pair
    torch.save(checkpoints.random_state(), tmp_path / "state.pt")
    expected = draw()
    assert draw() != expected
    checkpoints.set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draw() == expected


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_killed_at_any_event_of_a_save(save, folder, tmp_path):
    """A save that also replaces a checkpoint and drops an old one, ended before its first, second, ... file event.

    What is on the disk before an event is what a process that is killed there leaves; at some it is killed indeed.
    """
    for step in (1, 2, 3):
        save(step)
    before, moments = tmp_path / "before", tmp_path / "moments"
    shutil.copytree(folder, before)
    assert not _killed_while_saving(save, lambda number: shutil.copytree(folder, moments / f"{number}"))
    assert steps(folder) == [2, 3]
    events = len(list(moments.iterdir()))
    assert events > 20
    for event in range(1, events + 1):
        _assert_one_is_found(moments / f"{event}", event)
    for event in range(7, events, 14):
        shutil.rmtree(folder)
        shutil.copytree(before, folder)
        assert _killed_while_saving(save, lambda number, event=event: number == event and _kill())
        assert _files(folder) == _files(moments / f"{event}")
        _assert_one_is_found(folder, event)
        # the next save finds nothing in its way
        save(4)
        assert find_checkpoint("latest", folder, ARGUMENTS).step == 4
        assert not list(folder.glob(".*"))


def _killed_while_saving(save, do):
    """Save in a copy of this process that calls `do(number)` before each file event; whether it was killed."""
    child = os.fork()
    if child == 0:
        try:
            _at_file_events(do)
            save(3, keep=2)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def _at_file_events(do):
    number, busy = 0, False

    def count(event, _):
        nonlocal number, busy
        if event in FILE_EVENTS and not busy:
            number, busy = number + 1, True
            do(number)
            busy = False

    sys.addaudithook(count)


def _kill():
    os.kill(os.getpid(), signal.SIGKILL)


def _files(folder):
    """How large all files are; names made up at random are left out."""
    return sorted((path.suffix, path.stat().st_size) for path in folder.rglob("*") if path.is_file())


def _assert_one_is_found(folder, event):
    messages = []
    found = find_checkpoint("latest", folder, ARGUMENTS, messages.append)
    assert found.step in (2, 3) and len(messages) == 1, f"{messages} before event {event}"
