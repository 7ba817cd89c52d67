"""The training script, on a tiny SAM for a few steps."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image

from peft_talora import MSamForMultiTask
from peft_talora.data import Augmentation

ROOT = Path(__file__).parents[2]
PHOTOS = ROOT.parent / "shared/data/real_photos"
sys.path.insert(0, str(ROOT / "examples"))
import train_multitask as script  # noqa: E402


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def base(sam_factory, tmp_path):
    sam_factory().save_pretrained(tmp_path / "sam")
    return str(tmp_path / "sam")


@pytest.fixture
def scenes_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def arguments(base, output, *more):
    numbers = ["--num-train", "8", "--num-test", "3", "--steps", "2", "--batch-size", "4", "--rank", "4"]
    return ["--base", base, "--output-dir", str(output), *numbers, *more]


def run(base, output, *more):
    script.main(arguments(base, output, *more))
    return json.loads((Path(output) / "metrics.json").read_text())


def trainer(base, *more):
    """What `train` sets up: (accelerator, model, one batch)."""
    args = script.parse_args(arguments(base, "unused", *more))
    torch.manual_seed(0)
    rows, _, tasks = script.load_data(args, 32)
    msam = script.pt.MSamForMultiTask.from_sam(base, tasks)
    model = script.add_adapter(msam, args, args.method)
    loader = script.make_loader(rows, tasks, script.pt.MSamProcessor.from_model(msam), args, Augmentation())
    batch = next(iter(loader))
    batch["pixel_values"] = batch["pixel_values"].double()
    return Accelerator(cpu=True), model.double().train(), batch


@pytest.mark.slow
@pytest.mark.usefixtures("scenes_cache")
class TestRuns:
    @pytest.mark.parametrize("method", script.METHODS)
    def test_leaves_everything_and_the_adapter_loads_again(self, base, tmp_path, method):
        output = tmp_path / "run"
        metrics = run(base, output, "--method", method, "--checkpoint-every", "1")
        assert (
            metrics["method"] == method
            and metrics["steps"] == 2
            and list(metrics["tasks"])
            == [
                "semantic",
                "depth",
                "normals",
            ]
        )
        values = [value for task in metrics["tasks"].values() for value in task.values()]
        assert all(math.isfinite(value) for value in values)
        assert (metrics["baseline"] is None) == (method == "decoder") == (metrics["delta_b"] is None)
        weights = output / "adapter_model.safetensors"
        assert metrics["adapter_bytes"] == weights.stat().st_size > metrics["trainable_parameters"] * 4
        assert Image.open(output / "predictions.png").size[0] > 300
        for step in (1, 2):
            checkpoint = output / "checkpoints" / f"step-{step}"
            state = torch.load(checkpoint / "training_state.pt", weights_only=True)
            assert state["step"] == step
        last = MSamForMultiTask.from_adapter(checkpoint).eval()
        loaded = MSamForMultiTask.from_adapter(output, base_model=base).eval()
        pixels = torch.randn(1, 3, 32, 32)
        for task, logits in loaded(pixels).logits.items():
            torch.testing.assert_close(logits, last(pixels).logits[task])

    def test_equal_seeds_give_equal_numbers_and_a_baseline_file_is_used(self, base, tmp_path):
        first = run(base, tmp_path / "a", "--baseline", "none")
        again = run(base, tmp_path / "b", "--baseline", str(tmp_path / "a/metrics.json"))
        assert first["tasks"] == again["tasks"] == again["baseline"] and again["delta_b"] == 0.0
        assert run(base, tmp_path / "c", "--baseline", "none", "--seed", "1")["tasks"] != first["tasks"]

    def test_sequential_passes_accumulation_checkpointing_and_evaluations(self, base, tmp_path):
        options = ["--task-pass", "sequential", "--grad-accumulation", "2", "--gradient-checkpointing"]
        metrics = run(base, tmp_path / "run", *options, "--eval-every", "1", "--tasks", "depth", "saliency", "edges")
        assert list(metrics["tasks"]) == ["depth", "saliency", "edges"]

    def test_sequential_passes_give_the_gradients_of_the_joint_pass(self, base):
        accelerator, model, batch = trainer(base)
        gradients = []
        for backward in (script.backward_joint, script.backward_sequential):
            model.zero_grad()
            losses = backward(accelerator, model, batch)
            gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        assert losses.keys() == {"semantic", "depth", "normals"} and gradients[0].keys() == gradients[1].keys()
        assert any(gradient.abs().max() > 0 for name, gradient in gradients[0].items() if "talora_U2" in name)
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-12)

    @pytest.mark.skipif(not PHOTOS.exists(), reason="the real photos (../shared/data) are not here")
    def test_real_partly_labelled_photos(self, base, tmp_path):
        metrics = run(base, tmp_path / "run", "--dataset", str(PHOTOS), "--baseline", "train")
        assert list(metrics["tasks"]) == ["semantic", "depth", "normals"]
        assert all(math.isfinite(value) for task in metrics["tasks"].values() for value in task.values())


def write_parquet(folder, rows):
    import datasets

    folder.mkdir()
    datasets.Dataset.from_list(rows).to_parquet(folder / "train-00000-of-00001.parquet")
    return str(folder)


class TestBadInput:
    def test_dataset_without_image(self, base, tmp_path):
        data = write_parquet(tmp_path / "data", [{"picture": 1, "depth": [[1.0]]}])
        with pytest.raises(ValueError, match=r"no column 'image'.*picture"):
            script.main(arguments(base, tmp_path / "run", "--dataset", data))

    def test_task_without_a_column(self, base, tmp_path):
        image = np.zeros((3, 8, 8), dtype=np.float32).tolist()
        data = write_parquet(tmp_path / "data", [{"image": image, "depth": [[[1.0] * 8] * 8]}])
        with pytest.raises(ValueError, match=r"task 'saliency' needs the column 'saliency'.*depth"):
            script.main(arguments(base, tmp_path / "run", "--dataset", data, "--tasks", "depth", "saliency"))

    def test_missing_checkpoint(self, tmp_path):
        missing = str(tmp_path / "nowhere")
        with pytest.raises(FileNotFoundError, match="nowhere"):
            script.main(arguments(missing, tmp_path / "run"))

    def test_missing_dataset(self, base, tmp_path):
        with pytest.raises(FileNotFoundError, match="nothing-here"):
            script.main(arguments(base, tmp_path / "run", "--dataset", str(tmp_path / "nothing-here")))

    @pytest.mark.parametrize(
        "options", [["--steps", "0"], ["--baseline", "missing.json"], ["--method", "magic"], ["--batch-size", "-1"]]
    )
    def test_impossible_options(self, base, tmp_path, options, capsys):
        with pytest.raises(SystemExit):
            script.main(arguments(base, tmp_path / "run", *options))
        assert options[0] in capsys.readouterr().err

    def test_baseline_that_is_no_metrics_file(self, base, tmp_path):
        path = tmp_path / "other.json"
        path.write_text("[]")
        with pytest.raises(ValueError, match=r"other.json is no metrics.json"):
            script.read_baseline(str(path))
