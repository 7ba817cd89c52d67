"""Adapters to start from, and to evaluate: --init-from, --eval-only, --keep-best."""

import json

import pytest
import torch
import train_multitask as script
from safetensors.torch import load_file
from small_folders import write_folder
from training.adapter import adapter_config
from training.options import METHODS, parse_args

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_accelerator")]


@pytest.fixture
def options(data_folder):
    return ["--dataset", data_folder, "--steps", "3", "--batch-size", "2"]


def weights(output):
    return load_file(output / "adapter_model.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_starts_from_an_adapter_of_any_method(run, options, tmp_path, method):
    first = run(tmp_path / "first", *options, "--tasks", "depth", "--method", method)
    # after a step with rates of 0 the weights are those that it started from
    rates = [word for name in ("lr", "decoder-lr", "norm-lr", "embedding-lr") for word in (f"--{name}", "0")]
    second = run(tmp_path / "second", *options, "--init-from", str(tmp_path / "first"), "--steps", "1", *rates)
    expected, actual = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert actual.keys() == expected.keys() and all(torch.equal(actual[name], expected[name]) for name in expected)
    assert second["method"] == method and list(second["tasks"]) == ["depth"]
    assert second["tasks"] == first["tasks"] and second["trainable_parameters"] == first["trainable_parameters"]
    assert second["arguments"]["--init-from"] == str(tmp_path / "first") and second["baseline"] is None


class TestConfig:
    @pytest.mark.parametrize(
        ("arguments", "number", "expected"),
        [
            ([], 1, ("half", 1.4, 4)),
            ([], 3, ("half", 1.4, 4)),
            ([], 6, ("half", 1.4, 7)),
            (["--config", "init_weights=half"], 6, ("half", 1.4, 7)),
            (["--config", "scaling=0.5"], 3, ("half", 0.5, 4)),
            (["--config", "r_task=5"], 3, ("half", 1.4, 5)),
            # another start comes with TALoraConfig's own scaling
            (["--config", "init_weights=split"], 6, ("split", 0.5, 7)),
            (["--config", "init_weights=lora", "scaling=1"], 2, ("lora", 1, 4)),
            (["--config", "init_weights=True"], 6, (True, 0.5, 4)),
        ],
    )
    def test_start_of_talora(self, arguments, number, expected):
        args = parse_args(arguments)
        config = adapter_config("talora", args.rank, args.config, [f"task{index}" for index in range(number)])
        assert (config.init_weights, config.scaling, config.r_task) == expected and config.r == 8

    @pytest.mark.parametrize(
        ("method", "fields", "expected"),
        [
            ("talora", ["talora_dropout=0.1", "init_weights=lora"], {"talora_dropout": 0.1, "init_weights": "lora"}),
            ("convlora", ["num_experts=2", "gate_gradient=true"], {"num_experts": 2, "gate_gradient": True}),
            (
                "lora",
                ["use_dora=true", "lora_alpha=3", "bias=none"],
                {"use_dora": True, "lora_alpha": 3, "bias": "none"},
            ),
            ("lora", ["init_lora_weights=gaussian"], {"init_lora_weights": "gaussian"}),
        ],
    )
    def test_fields_are_the_adapters(self, run, options, tmp_path, method, fields, expected):
        run(tmp_path / "out", *options, "--tasks", "depth", "--method", method, "--config", *fields)
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert {name: config[name] for name in expected} == expected
        with pytest.raises(ValueError, match="--config"):
            run(
                tmp_path / "out",
                *options,
                "--tasks",
                "depth",
                "--method",
                method,
                "--resume",
                "latest",
                "--steps",
                "4",
            )

    @pytest.mark.parametrize(
        ("method", "field", "message"),
        [
            (
                "talora",
                "talora_dropuot=0.1",
                "talora_dropuot=0.1: TALoraConfig has no such field.*mean talora_dropout",
            ),
            ("talora", "talora_dropout=2", "`talora_dropout` must be .*got 2"),
            ("convlora", "scaling=1", "scaling=1: ConvLoraConfig has no such field to choose"),
            ("lora", "use_dora=yes", "use_dora=yes: LoraConfig expects True or False"),
            ("lora", "lora_dropout=much", "lora_dropout=much: LoraConfig expects a number"),
            ("lora", "lora_dropout=2", "--config lora_dropout=2: .*dropout"),
            ("lora", "bias=some", "--config bias=some: .*some"),
            ("lora", "lora_alpha=1e400", "lora_alpha=inf: LoraConfig expects a number"),
            ("lora", "layers_pattern=layers", "layers_pattern=layers: LoraConfig has no such field to choose"),
            ("lora", "modules_to_save=x", "modules_to_save=x: LoraConfig has no such field to choose"),
        ],
    )
    def test_what_does_not_fit_is_refused_before_the_data(self, tmp_path, method, field, message):
        arguments = [
            "--dataset",
            "missing",
            "--method",
            method,
            "--config",
            field,
            "--output-dir",
            str(tmp_path / "out"),
        ]
        with pytest.raises(ValueError, match=message):
            script.main(arguments)
        assert not (tmp_path / "out").exists()


def test_trains_on(run, options, tmp_path):
    run(tmp_path / "first", *options, "--tasks", "depth")
    run(tmp_path / "second", *options, "--init-from", str(tmp_path / "first"), "--lr", "0.05")
    before, after = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert any("talora_U2" in name and not torch.equal(before[name], after[name]) for name in before)


def test_evaluates_an_adapter_and_trains_nothing(base, run, options, arguments, tmp_path, monkeypatch, data_folder):
    trained = run(tmp_path / "run", *options, "--tasks", "semantic", "depth")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    monkeypatch.setattr(script, "train", None)
    command = [
        "--eval-only",
        "--init-from",
        str(tmp_path / "run"),
        "--dataset",
        data_folder,
        "--base",
        base,
        "--batch-size",
        "2",
    ]
    script.main([*command, "--baseline", str(tmp_path / "run/metrics.json")])
    assert {path: path.read_bytes() for path in before} == before
    found = json.loads((tmp_path / "run/evaluation/metrics.json").read_text())
    assert found["baseline"] == trained["tasks"] and found["delta_b"] == pytest.approx(0, abs=1e-3)
    for task, values in trained["tasks"].items():
        # a weight that requires a gradient is multiplied in another order
        assert found["tasks"][task] == pytest.approx(values, rel=1e-5)
    assert found["steps"] == 0 and found["class_iou"] == trained["class_iou"]
    assert found["adapter_bytes"] == trained["adapter_bytes"]
    assert (tmp_path / "run/evaluation/predictions.png").stat().st_size > 1000
    # again into the same folder: it is ours
    script.main(command)


def test_what_does_not_fit_the_adapter(run, options, arguments, tmp_path):
    run(tmp_path / "first", *options, "--tasks", "semantic", "depth")
    for tasks in (["depth", "semantic"], ["depth"], ["semantic", "depth", "normals"]):
        expected = r"--tasks: .*first is an adapter for \['semantic', 'depth'\], got \[.*say --tasks semantic depth; .*add_task"
        with pytest.raises(ValueError, match=expected):
            script.main(arguments(tmp_path / "x", *options, "--init-from", str(tmp_path / "first"), "--tasks", *tasks))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        script.main(arguments(tmp_path / "x", *options, "--init-from", str(tmp_path / "nowhere")))
    other = write_folder(tmp_path / "data", {"mask": {"kind": "binary", "files": "labels"}}, splits={"test": ["0"]})
    expected = (
        r"unknown task 'semantic'.* has \['mask'\]; .*first is an adapter for \['semantic', 'depth'\] and .*add_task"
    )
    with pytest.raises(ValueError, match=expected):
        script.main(arguments(tmp_path / "x", "--dataset", f"folder:{other}", "--init-from", str(tmp_path / "first")))


def test_classes_in_another_order_are_refused(run, tmp_path):
    names = ["background", "object", "rest"]
    fields = {"files": "labels", "class_names": names}
    first = write_folder(tmp_path / "first", {"semantic": fields})
    options = ["--steps", "1", "--batch-size", "2", "--crop-scales", "1"]
    run(tmp_path / "adapter", *options, "--dataset", f"folder:{first}")
    again = ["--init-from", str(tmp_path / "adapter"), "--eval-only", "--output-dir", str(tmp_path / "out")]
    for given, fits in (
        (names[:2], True),
        (["object", "background", "rest"], False),
        (["object", "background"], False),
    ):
        other = write_folder(tmp_path / "other", {"semantic": {**fields, "class_names": given}})
        if fits:
            script.main(["--dataset", f"folder:{other}", *again])
        else:
            with pytest.raises(ValueError, match=r"'semantic' has the classes \['object', 'background'.*class_map"):
                script.main(["--dataset", f"folder:{other}", *again])


def test_the_best_adapter_is_kept_and_training_stops(run, options, tmp_path, monkeypatch):
    """Values that say which evaluation is the best, whatever the model is."""
    values = iter([3.0, 1.0, 2.0, 2.0, 9.0])
    evaluate = script.evaluate

    def pretend(accelerator, model, loader, processor, tasks):
        found, classes = evaluate(accelerator, model, loader, processor, tasks)
        if len(loader.dataset) == 2:  # of validation rows
            found["depth"]["rmse"] = next(values)
        return found, classes

    monkeypatch.setattr(script, "evaluate", pretend)
    more = [
        "--tasks",
        "depth",
        "--steps",
        "8",
        "--checkpoint-every",
        "1",
        "--keep-checkpoints",
        "9",
        "--eval-every",
        "1",
    ]
    metrics = run(tmp_path, *options, *more, "--keep-best", "rmse", "--patience", "2")
    assert metrics["best"] == {"metric": "depth/rmse", "step": 2, "value": 1.0} and metrics["steps"] == 4
    best, last, kept = (weights(tmp_path / folder) for folder in ("checkpoints/step-2", "checkpoints/step-4", "."))
    assert all(torch.equal(kept[name], best[name]) for name in best)
    assert any(not torch.equal(kept[name], last[name]) for name in last)
    # what had given up does not begin again
    again = run(tmp_path, *options, *more, "--keep-best", "rmse", "--patience", "2", "--resume", "latest")
    assert again["steps"] == 4 and again["best"] == metrics["best"] and again["tasks"] == metrics["tasks"]
