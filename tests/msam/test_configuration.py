"""MSamConfig: its tasks, their order in files, and what it refuses."""

import json

import pytest
from transformers import AutoConfig, SamConfig, SamVisionConfig

from peft_talora import MSamConfig, TaskSpec

# in no alphabetical order, which is what JSON writers make of a dict
TASKS = {
    "semantic": TaskSpec("semantic", num_channels=2, weight=0.5, class_names=["wall", "floor"]),
    "depth": TaskSpec("depth"),
    "a_normals": {"kind": "normals"},
}
SMALL = {"vision_config": {"image_size": 96, "patch_size": 8, "hidden_size": 32}}


def test_tasks_are_stored_as_an_ordered_list():
    config = MSamConfig(tasks=TASKS, **SMALL)
    assert [task["name"] for task in config.tasks] == config.task_names == ["semantic", "depth", "a_normals"]
    assert config.tasks[0] == {
        "name": "semantic",
        "kind": "semantic",
        "num_channels": 2,
        "weight": 0.5,
        "ignore_index": 255,
        "class_names": ["wall", "floor"],
    }
    assert config.task_specs == {**TASKS, "a_normals": TaskSpec("normals")}
    assert list(config.task_specs) == list(TASKS)
    # a list makes the same configuration
    assert MSamConfig(tasks=config.tasks, **SMALL).tasks == config.tasks


def test_it_is_a_sam_config_and_more():
    config = MSamConfig(tasks=TASKS, **SMALL)
    assert isinstance(config, SamConfig) and config.model_type == "msam" and config.channel_mode == "prompt"
    assert isinstance(config.vision_config, SamVisionConfig) and config.vision_config.hidden_size == 32
    assert config.grid_size == 12
    assert config.mask_decoder_config.hidden_size == 256 and config.prompt_encoder_config.hidden_size == 256


@pytest.mark.parametrize("load", [MSamConfig.from_pretrained, AutoConfig.from_pretrained])
def test_save_and_load_keep_the_order(tmp_path, load):
    config = MSamConfig(tasks=TASKS, **SMALL)
    config.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded) is MSamConfig
    assert loaded.task_specs == config.task_specs and loaded.task_names == config.task_names
    assert loaded.vision_config.to_dict() == config.vision_config.to_dict()
    assert loaded.channel_mode == "prompt"
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "msam"


def test_no_tasks_are_fine_until_a_model_is_made():
    assert MSamConfig().tasks == [] == MSamConfig(tasks={}).task_names


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({"depth": "depth"}, "task 'depth': expected a TaskSpec"),
        ({"depth": {"kind": "deep"}}, "task 'depth': unknown task kind 'deep'"),
        ({"semantic": {"kind": "semantic"}}, "task 'semantic': a semantic task needs num_channels"),
        ({"two words": {"kind": "depth"}}, "'two words'"),
        ({"keys": {"kind": "depth"}}, "'keys'"),
        ([{"kind": "depth"}], "'name'"),
        ([{"name": "d", "kind": "depth"}, {"name": "d", "kind": "depth"}], "'d' occurs more than once"),
    ],
)
def test_impossible_tasks_are_named(tasks, message):
    with pytest.raises(ValueError, match=message):
        MSamConfig(tasks=tasks)


def test_channel_mode():
    with pytest.raises(ValueError, match=r"`channel_mode` must be one of .*, got 'both'"):
        MSamConfig(tasks=TASKS, channel_mode="both")
    assert MSamConfig(tasks=TASKS).channel_mode == "prompt"
    assert MSamConfig(tasks=TASKS, channel_mode="token").to_dict()["channel_mode"] == "token"
