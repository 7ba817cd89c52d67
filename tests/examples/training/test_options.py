"""The training script's options: groups, defaults, and what is refused."""

import re

import pytest
from training.options import make_parser, parse_args

GROUPS = ("data", "model", "training", "evaluation", "output")


@pytest.fixture
def refused(capsys):
    """``refused(*argv)``: the one line that a command line ends in."""

    def refuse(*argv):
        with pytest.raises(SystemExit) as error:
            parse_args(argv)
        message = capsys.readouterr().err
        assert error.value.code == 2 and message.count("\n") == 1, message
        assert message.startswith("train_multitask.py: error: ")
        return message

    return refuse


class TestHelp:
    def test_groups_and_defaults_are_shown(self):
        text = make_parser("Train.").format_help()
        assert [name for name in re.findall(r"^(\w+):$", text, re.M) if name != "options"] == list(GROUPS)
        flat = " ".join(text.split())
        for shown in ("optimiser steps (default: 80)", "AdamW's weight decay (default: 1e-06)", "(default: scenes)",
                      "0.005 for talora, 0.002 for convlora", "(default: 32 on every qkv, 8 on all linear layers, for convlora 3)"):  # fmt: skip
            assert shown in flat

    def test_every_option_has_a_sentence(self):
        text = make_parser("Train.").format_help()
        options = re.findall(r"^  (--[a-z-]+)", text, re.M)
        # what stands before the sentence: names and placeholders
        blocks = re.split(r"^  (?=--)", text, flags=re.M)[1:]
        assert len(options) == len(blocks) >= 35
        for block in blocks:
            words = " ".join(block.split()).replace("--num-train N", "").replace("--num-test N", "")
            assert len(words.split()) >= 4, block

    @pytest.mark.parametrize(
        ("arguments", "targets", "layers", "rank"),
        [
            ([], "all", "shared-half", 8),
            (["--targets", "qkv"], "qkv", "shared-half", 32),
            (["--rank", "5"], "all", "shared-half", 5),
            (["--layers", "last-half"], "all", "last-half", 8),
            (["--method", "lora"], "qkv", "all", 32),
            (["--method", "lora", "--targets", "all"], "all", "all", 8),
            (["--method", "convlora"], "qkv", "all", 3),
            (["--method", "convlora", "--targets", "all"], "all", "all", 3),
            (["--method", "full"], "qkv", "all", None),
        ],
    )
    def test_where_an_adapter_is_and_of_what_rank(self, arguments, targets, layers, rank):
        args = parse_args(arguments)
        assert (args.targets, args.layers, args.rank) == (targets, layers, rank)

    def test_values_without_an_option_depend_on_the_data_and_the_method(self):
        args = parse_args([])
        assert (args.max_train_images, args.max_test_images, args.crop_scales, args.baseline) == (
            512,
            64,
            [1.0],
            "train",
        )
        assert (args.lr, args.checkpoint_every, args.eval_every) == (5e-3, 8, None)
        args = parse_args(["--dataset", "folder:x", "--method", "convlora", "--steps", "100000"])
        assert (args.max_train_images, args.max_test_images, args.crop_scales) == (None, None, [1.0, 1.2, 1.5])
        assert (args.lr, args.rank, args.baseline, args.checkpoint_every) == (2e-3, 3, "none", 500)
        assert parse_args(["--keep-best", "miou", "--steps", "50"]).eval_every == 5
        assert parse_args(["--method", "decoder"]).baseline == "none"
        assert parse_args(["--init-from", "x"]).base is None
        assert parse_args(["--task-weights", "depth=2", "normals=0.5"]).task_weights == {"depth": 2.0, "normals": 0.5}


@pytest.mark.parametrize(
    ("text", "value"),
    [("scaling=1", 1), ("scaling=1e-2", 0.01), ("noisy_gating=False", False), ("use_dora=true", True), ("r_in=None", None),
     ("enable_qkv=[True, False, True]", [True, False, True]), ("grid_size=(4, 8)", [4, 8]), ("init_weights=lora", "lora"),
     ("init_weights={1}", "{1}"), ("bias=none", "none"), ("scaling=-1", -1)],
)  # fmt: skip
def test_fields_of_a_configuration(text, value):
    config = parse_args(["--config", text]).config
    assert config == {text.partition("=")[0]: value} and type(next(iter(config.values()))) is type(value)
    assert parse_args([]).config == {}


def test_options_of_several_values_may_be_given_again(refused):
    args = parse_args(
        ["--config", "scaling=1", "--config", "r_task=5", "--task-weights", "a=2", "--task-weights", "b=3"]
    )
    assert args.config == {"scaling": 1, "r_task": 5} and args.task_weights == {"a": 2, "b": 3}
    assert "--config: scaling is there twice" in refused("--config", "scaling=1", "--config", "scaling=2")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lr", "nan"], "--lr: expected a number from 0 to 10, got 'nan'"),
        (["--lr", "-1"], "--lr: expected .*got '-1'"),
        (["--lr=-1"], "--lr: expected .*got '-1'"),
        (["--lr", "1e30"], "--lr: expected a number from 0 to 10, got '1e30'"),
        (["--decoder-lr", "inf"], "--decoder-lr: expected .*'inf'"),
        (["--norm-lr", "x"], "--norm-lr: expected .*'x'"),
        (["--weight-decay", "nan"], "--weight-decay: expected a number from 0, got 'nan'"),
        (["--weight-decay", "inf"], "--weight-decay: expected a number from 0, got 'inf'"),
        (["--crop-scales", "0.5"], "--crop-scales: expected a number from 1"),
        (["--steps", "0"], "--steps: expected a whole number, at least 1, got '0'"),
        (["--batch-size", "-1"], "--batch-size"),
        (["--grad-accumulation", "1.5"], "--grad-accumulation.*'1.5'"),
        (["--keep-checkpoints", "0"], "--keep-checkpoints"),
        (["--seed", "-1"], "--seed"),
        (["--image-size", "0"], "--image-size"),
        (["--num-train", "0"], "--num-train"),
        (["--method", "magic"], "--method: invalid choice: 'magic'"),
        (["--report-to", "email"], "--report-to"),
        (["--baseline", "missing.json"], "--baseline: there is no file missing.json"),
        (["--task-weights", "depth"], "--task-weights: expected TASK=NUMBER"),
        (["--task-weights", "depth=0"], "--task-weights: expected TASK=NUMBER with a number above 0, got 'depth=0'"),
        (["--task-weights", "depth=nan"], "--task-weights"),
        (["--task-weights", "depth=1", "depth=2"], "--task-weights: depth is there twice"),
        (["--config", "scaling"], "--config: expected FIELD=VALUE, got 'scaling'"),
        (["--config", "scaling="], "--config: expected FIELD=VALUE"),
        (["--config", "r=4"], "--config: r is decided by --rank, got 'r=4'"),
        (["--config", "target_modules=proj"], "--config: target_modules is decided by --targets"),
        (["--config", "scaling=1", "scaling=2"], "--config: scaling is there twice"),
        (["--stepz", "3"], "unrecognized arguments: --stepz"),
    ],
)
def test_impossible_values(argv, message, refused):
    assert re.search(message, refused(*argv))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--dataset", "folder:x", "--camera", "photo"],
            "--camera is for rendered scenes, not for --dataset folder:x",
        ),
        (["--dataset=x", "--camera=ultrasound"], "--camera is for rendered scenes"),
        (["--method", "full", "--config", "scaling=1"], "--config does not apply to --method full: it has no adapter"),
        (["--init-from", "x", "--config", "scaling=1"], "--config cannot be chosen with --init-from"),
        (["--method", "decoder", "--rank", "4"], "--rank does not apply to --method decoder"),
        (["--method", "full", "--rank", "4"], "--rank does not apply to --method full"),
        (["--method", "full", "--targets", "all"], "--targets does not apply to --method full"),
        (["--method", "decoder", "--layers", "last-half"], "--layers does not apply to --method decoder"),
        (
            ["--method", "lora", "--layers", "shared-half"],
            "--layers shared-half is for --method talora: with lora all",
        ),
        (["--layers", "all", "--config", "shared_layers=[0]"], "--layers and --config shared_layers say the same"),
        (["--init-from", "x", "--targets", "all"], "--targets cannot be chosen with --init-from"),
        (["--method", "decoder", "--lr", "0.1"], "--lr does not apply to --method decoder"),
        (["--patience", "3"], "--patience needs --keep-best"),
        (["--init-from", "x", "--method", "lora"], "--method cannot be chosen with --init-from"),
        (["--init-from", "x", "--ran", "3"], "--rank cannot be chosen with --init-from"),
        (["--init-from", "x", "--resume", "latest"], "--resume resumes a run, --init-from starts one"),
        (["--eval-only"], "--eval-only needs --init-from"),
        (["--eval-only", "--init-from", "x", "--steps", "240"], "--steps does not apply to --eval-only"),
        (["--eval-only", "--init-from", "x", "--baseline", "train"], "--baseline train does not apply to --eval-only"),
    ],
)
def test_options_that_do_not_apply_are_refused(argv, message, refused):
    assert message in refused(*argv)


def test_of_many_processes_one_says_it(refused, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as error:
        parse_args(["--steps", "0"])
    assert error.value.code == 2 and capsys.readouterr().err == ""


def test_where_an_evaluation_goes(tmp_path):
    assert parse_args(["--eval-only", "--init-from", str(tmp_path)]).output_dir == tmp_path / "evaluation"
    assert parse_args(["--eval-only", "--init-from", "me/rooms"]).output_dir.as_posix() == "runs/evaluation"
    assert parse_args([]).output_dir.as_posix() == "runs/multitask"
