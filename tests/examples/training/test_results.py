"""metrics.json, the baseline's file, and what goes to trackers."""

import json

import pytest
import train_multitask as script
from training import results, tracking


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerator")
def test_metrics_say_how_they_came_about(run, data_folder, tmp_path):
    metrics = run(tmp_path, "--dataset", data_folder, "--max-train-images", "5", "--task-weights", "depth=3")
    assert metrics["arguments"]["--lr"] == 5e-3 and metrics["arguments"]["--task-weights"] == {"depth": 3.0}
    assert metrics["versions"].keys() >= {"python", "torch", "transformers", "peft", "accelerate"}
    dataset = metrics["dataset"]
    assert (dataset["name"], dataset["train_images"], dataset["test_images"]) == (data_folder, 5, 3)
    assert dataset["tasks"]["semantic"]["num_channels"] == 3 and metrics["metrics_resolution"] == "labels"
    ious = metrics["class_iou"]["semantic"]
    known = [value for value in ious.values() if value is not None]
    assert list(ious) == ["0", "1", "2"] and metrics["tasks"]["semantic"]["miou"] == pytest.approx(
        sum(known) / len(known)
    )


def test_baseline_that_is_no_metrics_file(tmp_path):
    path = tmp_path / "other.json"
    for text in ("[]", "{}", "no json"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"other.json is no metrics.json"):
            results.read_baseline(str(path))


def test_finished_baseline(tmp_path):
    path, arguments = tmp_path / "baseline.json", {"--steps": 3, "--seed": 0}
    assert results.finished_baseline(path, arguments) is None
    path.write_text(json.dumps({"arguments": arguments, "tasks": {"depth": {"rmse": 1.0}}}))
    assert results.finished_baseline(path, arguments) == {"depth": {"rmse": 1.0}}
    assert results.finished_baseline(path, arguments | {"--steps": 4}) is None
    with pytest.raises(ValueError, match=r"baseline.json .*--seed: given 7, saved 0"):
        results.finished_baseline(path, arguments | {"--seed": 7})


class TestTrackers:
    def test_a_missing_package_is_told_before_anything_is_trained(self, tmp_path, monkeypatch):
        monkeypatch.setattr(tracking, "get_available_trackers", lambda: [])
        for name in ("tensorboard", "trackio", "wandb"):
            with pytest.raises(ImportError, match=rf"--report-to {name}: .*pip install {name}"):
                script.main(["--report-to", name, "--output-dir", str(tmp_path / "out")])
        assert not (tmp_path / "out").exists()
        tracking.check_installed("none")

    @pytest.mark.slow
    @pytest.mark.usefixtures("fresh_accelerator")
    def test_curves_rates_results_and_picture_are_logged(self, run, data_folder, tmp_path, monkeypatch):
        from accelerate.tracking import GeneralTracker

        class Recorder(GeneralTracker):
            name, requires_logging_directory, main_process_only = "recorder", False, True
            logged, pictures, tracker = [], [], None

            def store_init_configuration(self, values):
                self.values = values

            def log(self, values, step=None, **_):
                self.logged.append((step, values))

            def log_images(self, values, step=None, **_):
                self.pictures.append((step, values))

        make = script.make_accelerator

        def with_recorder(args):
            accelerator = make(args)
            accelerator.log_with = [Recorder()]
            return accelerator

        monkeypatch.setattr(script, "make_accelerator", with_recorder)
        metrics = run(
            tmp_path, "--dataset", data_folder, "--method", "convlora", "--baseline", "train", "--eval-every", "1"
        )
        by_step = [(step, values.keys()) for step, values in Recorder.logged]
        for step in (1, 2):
            (names,) = [names for logged, names in by_step if logged == step and "convlora/loss/depth" in names]
            assert {f"learning rate/{name}" for name in ("decoders", "embeddings", "norms", "adapter")} <= names
            assert any(name.startswith("convlora/experts/") for name in names)
        assert not any(name.startswith("decoder/") for _, names in by_step for name in names)
        assert any(step == 1 and "convlora/depth/rmse" in names for step, names in by_step)
        final = {name: value for step, values in Recorder.logged if step == 2 for name, value in values.items()}
        assert final["final/depth/rmse"] == metrics["tasks"]["depth"]["rmse"]
        ((step, pictures),) = Recorder.pictures
        assert step == 2 and pictures["predictions"].ndim == 4


def test_words_name_the_methods_side_by_side():
    old, new = {"depth": {"abs_err": 1.0, "own": 2.0}}, {"depth": {"abs_err": 0.5}, "semantic": {"miou": None}}
    lines = [line.split() for line in results.table({"baseline": old, "talora": new}).splitlines()]
    assert lines == [
        ["task", "metric", "baseline", "talora"],
        ["depth", "abs_err", "(down)", "1.0000", "0.5000"],
        ["depth", "own", "2.0000", "-"],
        ["semantic", "miou", "(up)", "-", "-"],
    ]
