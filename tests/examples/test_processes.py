"""Two processes train what one trains."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import train_multitask as script
from peft import get_peft_model
from process_groups import in_a_process_group
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from peft_talora import MSamForMultiTask, TALoraConfig, save_adapter

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("scenes_cache", "fresh_accelerator")]

PASSES = ("joint", "sequential")

# several runs of the script in one launch, for the sake of the time that a launch takes
RUNS = """
import json, sys
import train_multitask as script

script.Accelerator.end_training = lambda self: None  # keep the process group
sys.path.insert(0, sys.argv[1])
from test_processes import in_float64
for argv in json.loads(sys.argv[2]):
    with in_float64(script):
        script.main(argv)
"""


@contextmanager
def in_float64(script):
    """Train in float64: Adam turns the rounding noise of a gradient that is almost 0 into steps of full size."""
    make_model = script.make_model

    def double(collate):
        def collate_double(rows):
            batch = collate(rows)
            return {**batch, "pixel_values": batch["pixel_values"].double()}

        return collate_double

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(script, "make_model", lambda *given: make_model(*given).double())
        for name in ("collate", "collate_own_size"):
            monkeypatch.setattr(script, name, double(getattr(script, name)))
        monkeypatch.setattr(script, "draw_predictions", lambda *given: None)
        yield


def launch(processes, runs):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    here = (Path(script.__file__).parent, Path(__file__).parents[1], os.environ.get("PYTHONPATH", ""))
    environment["PYTHONPATH"] = os.pathsep.join(map(str, here))
    program = Path(runs[0][runs[0].index("--output-dir") + 1]).parent / "runs.py"
    program.write_text(RUNS)
    done = subprocess.run(
        [*launcher, str(program), str(Path(__file__).parent), json.dumps(runs)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_two_processes_train_what_one_trains_and_go_on_where_they_stopped(arguments, tmp_path, partly_labelled_folder):
    """Of images that are partly labelled: how they are dealt out does not matter."""
    options = ["--dataset", partly_labelled_folder, "--crop-scales", "1", "--steps", "4"]
    noisy = [*options, "--batch-size", "2", "--method", "convlora", "--checkpoint-every", "2"]
    runs = [arguments(tmp_path / f"two-{p}", *options, "--batch-size", "2", "--task-pass", p) for p in PASSES]
    runs.append(arguments(tmp_path / "whole", *noisy))
    runs.append(arguments(tmp_path / "resumed", *noisy, "--resume", str(tmp_path / "whole/checkpoints/step-2")))
    launch(2, runs)
    with in_float64(script):
        for name in PASSES:
            script.main(arguments(tmp_path / f"one-{name}", *options, "--batch-size", "4", "--task-pass", name))
            assert_close(tmp_path / f"two-{name}", tmp_path / f"one-{name}")
            assert_close_metrics(tmp_path / f"two-{name}", tmp_path / f"one-{name}")
    # every process has noise of its own, and keeps it when resumed
    state = torch.load(tmp_path / "whole/checkpoints/step-2/training_state.pt", weights_only=True)
    first, second = (random["torch"] for random in state["random"])
    assert not torch.equal(first, second)
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("resumed", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()
    with pytest.raises(ValueError, match="processes: given 1, saved 2"):
        script.main(arguments(tmp_path / "whole", *noisy, "--resume", "latest"))


def assert_close_metrics(output, expected):
    """Three test images are an odd number for two processes: none of them counts twice."""
    actual, expected = (json.loads((directory / "metrics.json").read_text()) for directory in (output, expected))
    for task, values in expected["tasks"].items():
        assert actual["tasks"][task] == pytest.approx(values, rel=1e-3), task


def assert_close(output, expected):
    actual, expected = (load_file(directory / "adapter_model.safetensors") for directory in (output, expected))
    assert actual.keys() == expected.keys()
    moved = [name for name in actual if "talora_U2" in name]
    assert moved and all(actual[name].abs().max() > 1e-3 for name in moved)
    for name, weight in expected.items():
        torch.testing.assert_close(
            actual[name], weight, rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@in_a_process_group
def test_weights_that_fsdp_split_are_gathered_and_saved(base, tmp_path):
    """accelerate has FSDP on accelerators only; torch's own splits on CPUs, too."""
    msam = MSamForMultiTask.from_sam(base, {"depth": {"kind": "depth"}})
    config = TALoraConfig(r=4, init_weights=False)
    model = get_peft_model(msam, config)
    twin = get_peft_model(MSamForMultiTask.from_sam(base, {"depth": {"kind": "depth"}}), config)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    pixels = torch.randn(2, 3, 32, 32)
    expected = model(pixels).logits["depth"]
    expected.mean().backward()
    gradients = [p.grad for name, p in model.named_parameters() if "talora_U2" in name]
    assert gradients and all(isinstance(gradient, DTensor) for gradient in gradients)
    model.reshard()
    twin.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
    save_adapter(twin, tmp_path / "adapter")
    loaded = MSamForMultiTask.from_adapter(tmp_path / "adapter", base_model=base)
    torch.testing.assert_close(loaded(pixels).logits["depth"], expected.detach())
