"""The options of a comparison: what they mean, and what is told before a run."""

from pathlib import Path

import pytest
from comparison.methods import METHODS, Entry
from comparison.options import parse_args


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate-seeds", "1", "1"], "--rate-seeds: one seed says nothing of the noise"),
        (["--noise", "2", "--num-threads", "2"], "--noise 2 is the number of threads that all runs have"),
    ],
)
def test_what_would_say_nothing(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse_args(arguments)
    assert message in capsys.readouterr().err


def test_seeds():
    args, _ = parse_args([])
    assert (args.seeds, args.few_seeds, args.rate_seeds) == ([0, 1, 2, 3, 4], [0, 1, 2], [0, 1])
    assert parse_args(["--seeds", "7"])[0].rate_seeds == [7, 8]


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        ([], "runs/comparison/ultrasound"),
        (["--camera", "thermal"], "runs/comparison/thermal"),
        (["--dataset", "folder:data/nuclei/"], "runs/comparison/nuclei"),
        (["--dataset", "coco:labels/leaves.json"], "runs/comparison/leaves"),
        (["--dataset", "folder:nyu.v1"], "runs/comparison/nyu.v1"),
        (["--dataset", "folder:data/nyu/../leaves"], "runs/comparison/leaves"),
        (["--dataset", "coco:labels/LEAVES.JSON"], "runs/comparison/LEAVES"),
        (["--dataset", "tanganke/nyuv2"], "runs/comparison/nyuv2"),
        (["--output-dir", "here"], "here"),
    ],
)
def test_every_dataset_has_a_folder_of_its_own(arguments, folder):
    assert parse_args(arguments)[0].output_dir == Path(folder)


@pytest.mark.parametrize(
    "text",
    ["magic", "talora:0", "talora:x", "talora:", "talora:8:", "talora:r=8", "talora:scaling=1:8", "talora:a=b/c", "full:8",
     "decoder:scaling=1", "magic:scaling=1", "talora:scaling=1:scaling=2", "talora_last_half:shared_layers=[0]"],
)  # fmt: skip
def test_impossible_methods(text, capsys):
    with pytest.raises(SystemExit):
        parse_args(["--methods", text])
    assert text.partition(":")[0] in capsys.readouterr().err


def test_a_row_of_the_last_half_has_no_shared_layers(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--methods", "talora_last_half:shared_layers=[0]"])
    cure = capsys.readouterr().err.partition("take ")[2].split()[0]
    assert METHODS[cure].targets == METHODS["talora_last_half"].targets
    Entry.parse(f"{cure}:shared_layers=[0]")


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["--seed", "7"], "--seed"),
        (["--seed=7"], "--seed"),
        (["--see", "7"], "--seed"),
        (["--method=lora"], "--method"),
        (["--meth", "lora"], "--method"),
        (["--evaluate-on=validation"], "--evaluate-on"),
        (["--evaluate", "validation"], "--evaluate-on"),
        (["--one-task-each", "depth"], "--one-task-each"),
        (["--lr=0.1"], "--lr"),
        (["--targets", "all"], "--targets"),
        (["--layers", "last-half"], "--layers"),
        (["--config", "scaling=1"], "--config"),
        (["--decoder-l", "0.1"], "--decoder-lr"),
        (["--steps", "3", "--output-d", "x", "--resume", "latest"], "--resume"),
        (["--num-tr", "3"], "--max-train-images"),
    ],
)
def test_what_is_varied_cannot_be_given(arguments, name, capsys):
    with pytest.raises(SystemExit) as error:
        parse_args(arguments)
    message = capsys.readouterr().err
    assert error.value.code == 2 and message.count("\n") == 1
    assert f"{name} is what this script varies or decides" in message


@pytest.mark.parametrize("arguments", [["--stepz", "3"], ["--steps", "no"], ["--camera", "photo", "--dataset", "x"]])
def test_mistakes_in_options_of_the_training_script_are_told_before_a_run(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        parse_args(arguments)
    message = capsys.readouterr().err
    assert error.value.code == 2 and message.count("\n") == 1 and message.startswith("compare.py: error: ")
