"""A run that was interrupted ends as if it had not been."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import train_multitask as script
from accelerate.state import AcceleratorState

EXAMPLES = Path(script.__file__).parent
IDENTITY = (
    "--method",
    "--tasks",
    "--steps",
    "--seed",
    "--lr",
    "--batch-size",
    "--dataset",
    "--camera",
    "--base",
    "--rank",
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("scenes_cache", "fresh_accelerator")]


def weights(output):
    return (output / "adapter_model.safetensors").read_bytes()


def final_metrics(output):
    """All of metrics.json that does not depend on where, how long and in how many parts the run went."""
    metrics = json.loads((output / "metrics.json").read_text())
    arguments = {name: value for name, value in metrics["arguments"].items() if name in IDENTITY}
    return {**metrics, "train_seconds": None, "arguments": arguments}


def assert_same_end(output, expected):
    assert weights(output) == weights(expected)
    assert final_metrics(output) == final_metrics(expected)


def assert_equal_states(actual, expected):
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        actual, expected = list(actual.values()), list(expected.values())
    if isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for ours, theirs in zip(actual, expected, strict=True):
            assert_equal_states(ours, theirs)
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(actual, expected)
    else:
        assert actual == expected


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("talora", ["--grad-accumulation", "3"]),
        ("convlora", ["--eval-every", "1"]),
        ("lora", ["--task-pass", "sequential"]),
    ],
)
def test_goes_on_bit_for_bit_in_the_middle_of_an_epoch(run, tmp_path, monkeypatch, method, options):
    # dropout draws random numbers, too
    monkeypatch.setattr(script.pt, "TALoraConfig", partial(script.pt.TALoraConfig, talora_dropout=0.2))
    options += ["--method", method, "--baseline", "none", "--batch-size", "2", "--steps", "5"]
    run(tmp_path / "whole", *options, "--checkpoint-every", "1", "--keep-checkpoints", "5")
    torch.manual_seed(123)
    # the eight rows are four batches: with three a step, the second step ends in the second epoch
    run(tmp_path / "resumed", *options, "--resume", str(tmp_path / "whole/checkpoints/step-2"))
    assert_same_end(tmp_path / "resumed", tmp_path / "whole")
    resumed, whole = (
        torch.load(tmp_path / name / "checkpoints/step-5/training_state.pt", weights_only=True)
        for name in ("resumed", "whole")
    )
    assert resumed.pop("seconds") > 0 and whole.pop("seconds") > 0
    assert_equal_states(resumed, whole)


def test_damaged_checkpoint_is_skipped_and_the_baseline_is_not_trained_again(run, tmp_path, capsys, monkeypatch):
    options = ["--steps", "3", "--checkpoint-every", "1"]
    whole = tmp_path / "whole"
    run(whole, *options)
    shutil.copytree(whole, tmp_path / "killed")
    damaged = tmp_path / "killed/checkpoints/step-3/training_state.pt"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    trained = []
    train = script.train
    monkeypatch.setattr(script, "train", lambda *given: trained.append(given[0].method) or train(*given))
    run(tmp_path / "killed", *options, "--resume", "latest")
    assert trained == ["talora"]
    assert_same_end(tmp_path / "killed", whole)
    printed = capsys.readouterr().out
    assert f"skipping a damaged checkpoint: {damaged}" in printed
    assert f"resuming from {damaged.parents[1] / 'step-2'}" in printed


def test_finished_run_is_only_evaluated(run, tmp_path, monkeypatch):
    run(tmp_path, "--baseline", "none")
    shutil.copytree(tmp_path / "checkpoints", tmp_path / "copy/checkpoints")
    monkeypatch.setattr(script, "backward_joint", None)
    run(tmp_path / "copy", "--baseline", "none", "--resume", "latest")
    assert_same_end(tmp_path / "copy", tmp_path)


def test_contradicting_arguments(run, arguments, tmp_path):
    run(tmp_path, "--baseline", "none", "--steps", "1")
    contradictions = {
        "--method": ("lora", "'talora'"),
        "--tasks": ("depth", r"\['semantic', 'depth', 'normals'\]"),
        "--num-train": ("9", "8"),
        "--batch-size": ("3", "4"),
        "--seed": ("5", "0"),
        "--grad-accumulation": ("2", "1"),
        "--mixed-precision": ("bf16", "'no'"),
        "--lr": ("0.5", "0.005"),
    }
    for name, (given, saved) in contradictions.items():
        shown = {"--num-train": "--max-train-images"}.get(name, name)
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.raises(ValueError, match=rf"step-1 .*{shown}: given \[?'?{given}'?\]?, saved {saved}"):
            script.main(arguments(tmp_path, "--steps", "1", "--resume", "latest", name, given))


def test_finished_baseline_of_other_arguments(run, arguments, tmp_path):
    run(tmp_path, "--steps", "1")
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match=r"baseline.json .*--seed: given 7, saved 0"):
        script.main(arguments(tmp_path, "--steps", "1", "--resume", "latest", "--seed", "7"))


def test_nothing_to_resume(run, arguments, tmp_path, capsys):
    run(tmp_path, "--baseline", "none", "--steps", "1", "--resume", "latest")
    assert "no checkpoint" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="--resume nowhere is no checkpoint"):
        script.main(arguments(tmp_path, "--resume", "nowhere"))


def test_new_run_does_not_mix_with_the_checkpoints_of_an_earlier_one(run, tmp_path, capsys):
    run(tmp_path, "--baseline", "none", "--steps", "3")
    run(tmp_path, "--baseline", "none", "--steps", "1")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-1"]
    earlier = {path.name for path in (tmp_path / "checkpoints.old").iterdir()}
    assert earlier == {"step-1", "step-2", "step-3"}
    assert "checkpoints of an earlier run" in capsys.readouterr().out


# one process pays for the imports, and every run is a copy of it
FORK_SERVER = """
import json, os, sys
import train_multitask

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.dup2(2, 1)
        train_multitask.main(json.loads(line))
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture
def start(tmp_path):
    """``start(argv)``: the id of a process that runs the script, and a function that waits for its status."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(EXAMPLES), os.environ.get("PYTHONPATH", "")])
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(
            [sys.executable, "-c", FORK_SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        ) as server,
    ):

        def begin(argv):
            server.stdin.write(json.dumps(argv) + "\n")
            server.stdin.flush()
            return int(server.stdout.readline()), lambda: int(server.stdout.readline())

        yield begin
        server.stdin.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_kills_at_random_moments_change_nothing(start, arguments, tmp_path):
    """Half of the runs are killed while they start, half after they wrote a checkpoint or two, saves included."""
    # what a save is at any of its moments is for test_checkpoints
    options = ["--steps", "12", "--tasks", "depth", "--baseline", "none", "--batch-size", "2", "--checkpoint-every", "1", "--keep-checkpoints", "2"]  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    _, wait = start(arguments(whole, *options))
    assert wait() == 0, (tmp_path / "log").read_text()
    moments = random.Random(0)
    for kill in range(8):
        before = checkpoints_in(killed)
        pid, wait = start(arguments(killed, *options, "--resume", "latest"))
        while kill % 2 and checkpoints_in(killed) == before:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.15 if kill % 2 else 1.0))
        os.kill(pid, signal.SIGKILL)
        assert wait() == signal.SIGKILL
    assert checkpoints_in(killed) and not (killed / "metrics.json").exists()
    _, wait = start(arguments(killed, *options, "--resume", "latest"))
    assert wait() == 0, (tmp_path / "log").read_text()
    assert_same_end(killed, whole)
    assert "damaged" not in (tmp_path / "log").read_text()


def checkpoints_in(output):
    return {
        path.name for folder in ("baseline_checkpoints", "checkpoints") for path in (output / folder).glob("step-*")
    }
