"""What TALoraConfig accepts, what it refuses, and which layers it hits."""

import dataclasses
import json
import warnings

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import SamHQConfig, SamHQModel, SamHQVisionModel, SamVisionModel

from peft_talora import MSamForMultiTask, TALoraConfig, TALoraLayer, TaskSpec

TASKS = ["depth", "a_normals", "semantic"]  # in no alphabetical order


def tuned(model, **config):
    return get_peft_model(model, TALoraConfig(**{"tasks": TASKS, "r": 2, "r_task": 2, **config}))


def tuned_layers(model):
    return [name for name, module in model.base_model.model.named_modules() if isinstance(module, TALoraLayer)]


class TestValidation:
    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"tasks": ["depth", "normals", "depth"]}, "'depth' occurs more than once"),
            ({"tasks": ["depth", "a.b"]}, r"'a\.b'"),
            ({"tasks": ["class"]}, "no keyword, got 'class'"),
            ({"tasks": ["depth", "keys"]}, "'keys': that is an attribute of torch.nn.ModuleDict"),
            ({"tasks": ["training"]}, "'training'"),
            ({"tasks": []}, "at least one task"),
            ({"tasks": "depth"}, "got the string 'depth'"),
            ({"r": 0}, "`r` must be a positive integer, got 0"),
            ({"r_in": 0}, "`r_in` must be a positive integer, got 0"),
            ({"r_out": -1}, "`r_out` must be a positive integer, got -1"),
            ({"r_task": 0}, "`r_task` must be a positive integer, got 0"),
            ({"r": 2.0}, r"`r` must be a positive integer, got 2\.0"),
            ({"r": True}, "`r` must be a positive integer, got True"),
            ({"talora_dropout": -0.1}, r"`talora_dropout` must be in \[0, 1\), got -0\.1"),
            ({"talora_dropout": 1.0}, r"`talora_dropout` must be in \[0, 1\), got 1\.0"),
            ({"talora_dropout": "0.1"}, r"`talora_dropout` must be in \[0, 1\), got '0\.1'"),
            ({"talora_dropout": False}, r"`talora_dropout` must be in \[0, 1\), got False"),
            ({"scaling": float("nan")}, "`scaling` must be a finite number, got nan"),
            ({"scaling": float("-inf")}, "`scaling` must be a finite number, got -inf"),
            ({"scaling": "0.5"}, r"`scaling` must be a finite number, got '0\.5'"),
            ({"scaling": None}, "`scaling` must be a finite number, got None"),
            ({"scaling": True}, "`scaling` must be a finite number, got True"),
            ({"scaling": 10**400}, "`scaling` must be a finite number, got 10"),
            ({"scaling": [0.5]}, r"`scaling` must be a finite number, got \[0\.5\]"),
            ({"ortho_reg_weight": float("nan")}, "`ortho_reg_weight` must be a finite number, got nan"),
            ({"ortho_reg_weight": "1"}, "`ortho_reg_weight` must be a finite number, got '1'"),
            ({"r": "8"}, "`r` must be a positive integer, got '8'"),
            ({"r": float("nan")}, "`r` must be a positive integer, got nan"),
            ({"tasks": 3}, "expected a list of task names, got 3"),
            ({"enable_qkv": True}, r"three booleans .* got True"),
            ({"target_modules": "qkv("}, r"`target_modules` must be names or a regular expression, got 'qkv\('"),
            ({"exclude_modules": "*"}, r"`exclude_modules` must be names or a regular expression, got '\*'"),
            ({"enable_qkv": [True, False]}, r"three booleans .* got \[True, False\]"),
            ({"enable_qkv": [True, False, 1]}, r"three booleans .* got \[True, False, 1\]"),
            ({"enable_qkv": [False] * 3}, "at least one of q, k and v"),
            ({"init_weights": "gaussian"}, "`init_weights` must be one of .*, got 'gaussian'"),
            ({"init_weights": 1}, "`init_weights` must be one of .*, got 1"),
            ({"init_weights": None}, "`init_weights` must be one of .*, got None"),
            ({"ortho_reg_weight": -1.0}, r"`ortho_reg_weight` must not be negative, got -1\.0"),
            ({"target_modules": ".*qkv", "layers_to_transform": [1]}, "`layers_to_transform` cannot be used"),
            ({"target_modules": ".*qkv", "layers_pattern": "layers"}, "`layers_pattern` cannot be used"),
            ({"layers_pattern": "layers"}, "`layers_to_transform` must also be specified"),
        ],
    )
    def test_impossible_values_are_named(self, config, message):
        with pytest.raises(ValueError, match=message):
            TALoraConfig(**config)

    @pytest.mark.parametrize("init_weights", [True, False, "split", "half", "lora", "orthogonal", "normalized"])
    def test_every_start_is_accepted(self, init_weights):
        assert TALoraConfig(init_weights=init_weights).init_weights is init_weights

    def test_defaults_are_the_published_ones_but_for_dropout_and_the_start(self):
        config = TALoraConfig()
        assert (config.r, config.r_in, config.r_out, config.r_task, config.scaling) == (32, None, None, 4, 0.5)
        assert (config.rank_in, config.rank_out) == (32, 32)
        assert config.init_weights == "split" and config.ortho_reg_weight == 0.0 and config.talora_dropout == 0.0
        config = TALoraConfig(r=8, r_in=5, r_out=7)
        assert (config.rank_in, config.rank_out) == (5, 7)

    @pytest.mark.parametrize("ranks", [{}, {"r_task": 8, "r_out": 4}])
    def test_tasks_that_start_alike_are_a_warning(self, sam, ranks, recwarn):
        tasks = ["a", "b", "c", "d", "e"]
        with pytest.warns(UserWarning, match=r"the 5 tasks share 4 LoRAs .* 'a' and 'e' start alike: set r_task"):
            get_peft_model(sam, TALoraConfig(tasks=tasks, **{"r": 6, **ranks}))
        recwarn.clear()
        for config in ({"r_task": 5}, {"tasks": tasks[:4]}, {"init_weights": "lora"}):
            tuned(
                nn.Sequential(nn.Linear(6, 6)),
                **{"tasks": tasks, "target_modules": ["0"], "r": 6, "r_task": 4, **config},
            )
        assert not [warning for warning in recwarn if "start alike" in str(warning.message)]

    @pytest.mark.parametrize("start", ["half", "lora"])
    @pytest.mark.parametrize(("tasks", "slices"), [("abc", 3), ("abcde", 4), ("ab", 1)])
    def test_tasks_without_a_slice_of_their_own_are_a_warning(self, tasks, slices, start, recwarn):
        def adapter(**config):
            return tuned(
                nn.Sequential(nn.Linear(6, 6)),
                **{"tasks": list(tasks), "target_modules": ["0"], "r": 6, "init_weights": start, **config},
            )

        words = rf"of the {len(tasks)} tasks .* these {slices - 1} are left: set r_task \(now {slices}\) to at least {len(tasks) + 1}"
        with pytest.warns(UserWarning, match=words):
            adapter(r_task=slices)
        recwarn.clear()
        for config in ({"r_task": len(tasks) + 1}, {"tasks": ["a"], "r_task": 1}):
            adapter(**config)
        assert not [warning for warning in recwarn if "r_task" in str(warning.message)]

    @pytest.mark.parametrize(
        ("tasks", "ranks", "without"),
        [("abcde", {"r": 5}, "e"), ("abcde", {"r": 3}, "c"), ("abc", {"r_in": 3, "r_out": 9}, "c"), ("ab", {"r": 1}, "a")],
    )  # fmt: skip
    def test_tasks_without_a_rank_of_their_own_are_a_warning(self, tasks, ranks, without, recwarn):
        def own_ranks(**config):
            """How many ranks each task has at the start beside those of all tasks."""
            more = {"r_task": len(tasks) + 1, "init_weights": "half", "tasks": list(tasks), "target_modules": ["0"]}
            layer = tuned(nn.Sequential(nn.Linear(16, 16)), **more, **config).base_model.model[0]
            of_tasks = (
                layer.talora_U3["default"][:, : len(tasks)] @ layer.talora_G["default"].sum((0, 1))[: len(tasks)]
            )
            return dict(zip(tasks, of_tasks.tolist(), strict=True))

        left = tasks.index(without)
        words = rf"one rank is for all of the {len(tasks)} tasks .*these {left} are left: set r, .*now \d and \d.*at least {len(tasks) + 1} in"
        with pytest.warns(UserWarning, match=words):
            found = own_ranks(**ranks)
        assert [task for task in tasks if not found[task]] == list(tasks[left:])
        recwarn.clear()
        assert set(own_ranks(r=len(tasks) + 1).values()) == {1.0}
        assert not [warning for warning in recwarn if "is for all of" in str(warning.message)]

    def test_a_saved_adapter_starts_nowhere_and_warns_of_nothing(self, tmp_path, recwarn):
        def base():
            return nn.Sequential(nn.Linear(6, 6))

        config = {"tasks": list("abcde"), "target_modules": ["0"], "r": 6, "r_task": 4, "init_weights": "lora"}
        tuned(base(), **config).save_pretrained(tmp_path)
        assert [warning for warning in recwarn if "r_task" in str(warning.message)]
        recwarn.clear()
        PeftModel.from_pretrained(base(), tmp_path)
        assert not [warning for warning in recwarn if "r_task" in str(warning.message)]

    def test_tasks_are_required_of_a_model_that_has_none(self, sam):
        with pytest.raises(ValueError, match=r"TALoraConfig\.tasks is required for a SamModel"):
            get_peft_model(sam, TALoraConfig())
        # the refusal came before anything was replaced
        assert not any(isinstance(module, TALoraLayer) for module in sam.modules())

    def test_tasks_that_are_not_the_models_are_named_with_the_models(self, sam):
        msam = MSamForMultiTask.from_sam(sam, {"depth": TaskSpec("depth"), "normals": TaskSpec("normals")})
        for tasks in (["depth"], ["normals", "depth"]):
            with pytest.raises(ValueError, match=rf"{tasks[0]}.*\['depth', 'normals'\]"):
                get_peft_model(msam, TALoraConfig(tasks=tasks))
        assert get_peft_model(msam, TALoraConfig(r=2)).peft_config["default"].tasks == ["depth", "normals"]

    def test_enable_qkv_on_a_layer_of_no_three_parts(self):
        model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 8))
        with pytest.raises(ValueError, match=r"the layer '1' has 8 output features, which is not divisible by 3"):
            tuned(model, target_modules=["0", "1"], enable_qkv=[True, False, True])

    def test_enable_qkv_on_a_layer_that_is_hardly_a_fused_one(self, sam):
        with pytest.warns(UserWarning, match=r"takes the layer '0' for a fused q/k/v projection.*target_modules"):
            tuned(nn.Sequential(nn.Linear(4, 6)), target_modules=["0"], enable_qkv=[True, False, True])
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            tuned(sam, target_modules=["qkv"], r=3, r_task=3, enable_qkv=[True, False, True])

    def test_a_layer_that_is_not_linear(self):
        with pytest.raises(TypeError, match=r"Target module '0' \(Conv2d\) is not supported"):
            tuned(nn.Sequential(nn.Conv2d(3, 3, 1)), target_modules=["0"])

    def test_msam_on_another_model_is_refused(self, sam):
        fields = {"tasks": [{"name": name, "kind": "depth"} for name in TASKS]}
        with pytest.raises(ValueError, match=r"\['depth', 'a_normals', 'semantic'\], but the model is a SamModel"):
            tuned(sam, msam=fields)


def test_every_field_has_a_help_text():
    own = {field.name: field for field in dataclasses.fields(TALoraConfig)}
    inherited = {field.name for field in dataclasses.fields(PeftConfig)}
    assert own.keys() - inherited >= {"tasks", "r", "r_task", "scaling", "ortho_reg_weight", "msam"}
    for name in own.keys() - inherited:
        assert len(own[name].metadata.get("help", "")) > 20, name


def test_save_and_load_keep_everything(tmp_path):
    config = TALoraConfig(
        tasks=TASKS,
        r=5,
        r_out=3,
        r_task=2,
        scaling=0.25,
        talora_dropout=0.1,
        enable_qkv=(True, False, True),
        init_weights="orthogonal",
        ortho_reg_weight=1.0,
        target_modules=["qkv", "proj"],
        exclude_modules=["neck"],
        layers_to_transform=[2, 0],
        modules_to_save=["mask_decoder"],
        msam={"tasks": [{"name": name, "kind": "depth"} for name in TASKS], "image_size": 32},
    )
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is TALoraConfig
    assert loaded.tasks == TASKS and [task["name"] for task in loaded.msam["tasks"]] == TASKS
    assert loaded.init_weights == "orthogonal" and loaded.enable_qkv == [True, False, True]
    changed = {f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(loaded, f.name)}
    assert changed <= {"inference_mode", "peft_version"}, changed  # what PEFT itself writes
    # the same values give the same file: a diff of two adapters shows what differs
    first = (tmp_path / "adapter_config.json").read_text()
    config.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").read_text() == first
    assert json.loads(first)["peft_type"] == "TALORA"


def plain_sam(sam):
    return sam


def sam_vision_model(sam):
    return SamVisionModel(sam.config.vision_config)


def sam_hq_config(sam):
    parts = ("vision_config", "prompt_encoder_config", "mask_decoder_config")
    values = {part: getattr(sam.config, part).to_dict() for part in parts}
    return SamHQConfig(
        **{part: {k: v for k, v in value.items() if k != "model_type"} for part, value in values.items()}
    )


def sam_hq(sam):
    config = sam_hq_config(sam)
    config.mask_decoder_config.vit_dim = config.vision_config.hidden_size
    return SamHQModel(config)


def sam_hq_vision_model(sam):
    return SamHQVisionModel(sam_hq_config(sam).vision_config)


def msam(sam):
    return MSamForMultiTask.from_sam(sam, {name: TaskSpec("depth") for name in TASKS})


class TestDefaultTargets:
    @pytest.mark.parametrize(
        "make", [plain_sam, sam_vision_model, sam_hq, sam_hq_vision_model, msam], ids=lambda make: make.__name__
    )
    def test_the_fused_qkv_of_the_vision_encoder_and_nothing_else(self, sam, make):
        model = tuned(make(sam), modules_to_save=[])
        assert model.base_model.model.config.model_type in model.base_model.target_module_mapping
        assert tuned_layers(model) == [f"vision_encoder.layers.{i}.attn.qkv" for i in range(3)]
        layer = model.base_model.model.vision_encoder.layers[0].attn.qkv
        assert layer.talora_U1["default"].shape == (16, 2) and layer.talora_U2["default"].shape == (48, 2)

    @pytest.mark.parametrize(("layers", "expected"), [([2, 0], [0, 2]), (1, [1]), (0, [0]), ([2], [2])])
    def test_layers_to_transform_picks_exactly_these(self, sam, layers, expected):
        model = tuned(sam, layers_to_transform=layers)
        assert tuned_layers(model) == [f"vision_encoder.layers.{i}.attn.qkv" for i in expected]

    def test_layers_that_do_not_exist(self, sam):
        with pytest.raises(ValueError, match=r"'layers_to_transform': \[7\]"):
            tuned(sam, layers_to_transform=[7])

    def test_own_targets_replace_the_default(self, sam, sam_factory):
        model = tuned(sam_factory(), target_modules=r"vision_encoder\.layers\.\d+\.mlp\.lin1")
        assert tuned_layers(model) == [f"vision_encoder.layers.{i}.mlp.lin1" for i in range(3)]
        model = tuned(msam(sam), target_modules=["qkv", "attn.proj"], exclude_modules=["layers.1.attn.proj"])
        names = [name.removeprefix("vision_encoder.layers.") for name in tuned_layers(model)]
        assert names == ["0.attn.qkv", "0.attn.proj", "1.attn.qkv", "2.attn.qkv", "2.attn.proj"]

    def test_an_unknown_model_needs_targets(self):
        with pytest.raises(ValueError, match="target_modules"):
            tuned(nn.Sequential(nn.Linear(3, 3)))


def test_ranks_and_scaling_reach_the_layer():
    model = tuned(nn.Sequential(nn.Linear(5, 9)), target_modules=["0"], r=2, r_out=3, r_task=4, scaling=2.0,
                  enable_qkv=[False, True, True])  # fmt: skip
    layer = model.base_model.model[0]
    shapes = {name: tuple(getattr(layer, name)["default"].shape) for name in layer.adapter_layer_names}
    assert shapes == {"talora_G": (2, 3, 4), "talora_U1": (5, 2), "talora_U2": (6, 3), "talora_U3": (3, 4)}
    with torch.no_grad():
        for name in layer.adapter_layer_names:
            getattr(layer, name)["default"].fill_(1.0)
    delta = layer.get_delta_weight("default", 0)
    # every entry of an enabled third is s * p * q * v
    assert torch.equal(delta[:3], torch.zeros(3, 5)) and torch.equal(delta[3:], torch.full((6, 5), 2.0 * 2 * 3 * 4))
