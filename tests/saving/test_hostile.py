"""An adapter whose configuration asks for the impossible: one clear line within a second, and no gigabytes."""

import json
import resource
import time

import pytest
from peft import LoraConfig, PeftModel, get_peft_model

from peft_talora import (
    ConvLoraConfig,
    MSamForMultiTask,
    TALoraConfig,
    TaskSpec,
    default_modules_to_save,
    load_adapter,
    save_adapter,
)
from peft_talora.saving.patterns import check_patterns

TASKS = {"semantic": TaskSpec("semantic", num_channels=3), "depth": TaskSpec("depth")}
# (a+)+ on the name of a layer takes longer than anybody waits
FOREVER = r"(\w+\.?)+attn\.qkv\d"


@pytest.fixture
def tiny_sam(sam_factory):
    return sam_factory(image_size=8, hidden_size=8, num_hidden_layers=1, global_attn_indexes=[0], window_size=2)


def configs(msam):
    saved = default_modules_to_save(msam)
    return {
        "talora": TALoraConfig(r=2),
        "talora alone": TALoraConfig(r=2, modules_to_save=[]),
        "convlora": ConvLoraConfig(r=2),
        "convlora alone": ConvLoraConfig(r=2, modules_to_save=[]),
        "lora": LoraConfig(r=2, target_modules=["qkv"], modules_to_save=saved),
        "lora alone": LoraConfig(r=2, target_modules=["qkv"]),
    }


@pytest.fixture
def saved(tiny_sam, tmp_path):
    def save(kind, channel_mode="prompt"):
        msam = MSamForMultiTask.from_sam(tiny_sam, TASKS, channel_mode=channel_mode)
        return save_adapter(get_peft_model(msam, configs(msam)[kind]), tmp_path / "adapter")

    return save


def edit(path, changes, tasks=None):
    """Change entries of adapter_config.json, and of what it or msam.json says of the mSAM (keys with a dot before)."""
    for file in (path / "adapter_config.json", path / "msam.json"):
        if file.exists():
            values = json.loads(file.read_text())
            fields = values if file.name == "msam.json" else values.get("msam")
            if file.name == "adapter_config.json":
                values.update({key: value for key, value in changes.items() if key[0] != "."})
                if tasks is not None and values.get("tasks"):
                    values["tasks"] = [task["name"] for task in tasks]
            if fields is not None:
                fields.update({key[1:]: value for key, value in changes.items() if key[0] == "."})
                if tasks is not None:
                    fields["tasks"] = tasks
            file.write_text(json.dumps(values))


def refused(path, sam, message):
    peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(path, base_model=sam)
    # a second on a quiet machine
    assert time.perf_counter() - start < 3.0
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024 < 300  # MB
    text = str(caught.value)
    assert "\n" not in text and len(text) < 1000, text


def channels(number):
    return [{"name": "semantic", "kind": "semantic", "num_channels": number}, {"name": "depth", "kind": "depth"}]


MANY = [{"name": f"t{i}", "kind": "depth"} for i in range(3000)]


@pytest.mark.filterwarnings("ignore")
class TestFromAdapter:
    @pytest.mark.parametrize(
        ("kind", "changes", "message"),
        [
            ("talora", {"r": 10**9}, r"talora_G' has another shape .* expected \(1000000000, 1000000000, 4\)"),
            ("talora", {"r_task": 10**9}, r"talora_G' has another shape"),
            ("talora alone", {"r_in": 10**18}, r"talora_G' has another shape"),
            ("convlora", {"r": 10**9}, "convlora_expert_bias' has another shape"),
            ("convlora", {"num_experts": 10**9}, "convlora_expert_bias' has another shape"),
            ("lora", {"r": 10**9}, "lora_A.weight' has another shape"),
            ("lora", {"r": 10**30}, "adapter_config.json describes no adapter"),
            ("talora", {".image_size": 16000}, r"image_size is 16000 pixels, at most 4096"),
            ("lora alone", {".image_size": 16000}, r"image_size is 16000 pixels, at most 4096"),
            ("talora", {".image_size": 10**400}, r"image_size is 1"),
            ("talora", {".image_size": "8"}, "`image_size` must be a positive integer, got '8'"),
            ("talora", {".channel_mode": "both"}, "`channel_mode` must be one of"),
            (
                "talora",
                {"scaling": float("nan")},
                "adapter_config.json cannot be read: `scaling` must be a finite number",
            ),
            ("talora", {"scaling": "0.5"}, "adapter_config.json cannot be read: `scaling` must be a finite number"),
            ("convlora", {"convlora_alpha": float("inf")}, "adapter_config.json cannot be read: `convlora_alpha`"),
            ("talora", {"target_modules": "*qkv"}, "`target_modules` must be names or a regular expression, got"),
            ("lora", {"target_modules": "*qkv"}, "`target_modules` has no regular expression"),
            ("lora", {"exclude_modules": "("}, "`exclude_modules` has no regular expression"),
            ("talora", {"target_modules": FOREVER}, "regular expression takes too long .* target_modules="),
            ("talora", {"exclude_modules": FOREVER}, "regular expression takes too long .* exclude_modules="),
            ("lora", {"target_modules": FOREVER}, "regular expression takes too long .* target_modules="),
            ("lora", {"modules_to_save": [FOREVER]}, "regular expression takes too long .* modules_to_save="),
            ("lora", {"rank_pattern": {FOREVER: 3}}, "regular expression takes too long .* rank_pattern="),
        ],
    )
    def test_a_configuration(self, saved, tiny_sam, kind, changes, message):
        path = saved(kind)
        edit(path, changes)
        refused(path, tiny_sam, message)

    @pytest.mark.parametrize("channel_mode", ["prompt", "token"])
    @pytest.mark.parametrize("kind", ["talora", "convlora alone"])
    @pytest.mark.parametrize("tasks", [channels(10**7), channels(2000), MANY[:500]])
    def test_tasks(self, saved, tiny_sam, kind, channel_mode, tasks):
        path = saved(kind, channel_mode)
        edit(path, {}, tasks)
        refused(path, tiny_sam, r"channels|tasks|another shape|missing|does not belong")

    def test_a_long_file(self, saved, tiny_sam):
        path = saved("lora")
        edit(path, {"note": "x" * 20_000_000})
        refused(path, tiny_sam, r"adapter_config.json cannot be read: it has 20,\d+,\d+ bytes")


class TestThroughPeft:
    @pytest.mark.parametrize("kind", ["talora", "convlora"])
    def test_ranks(self, saved, tiny_sam, kind):
        path = saved(kind)
        edit(path, {"r": 10**9})
        msam = MSamForMultiTask.from_sam(tiny_sam, TASKS)
        with pytest.raises(ValueError, match="has another shape than in the configuration"):
            PeftModel.from_pretrained(msam, path)


class TestPatterns:
    NAMES = [f"vision_encoder.layers.{index}.attn.qkv" for index in range(32)]

    @pytest.mark.parametrize(
        "pattern",
        [
            r"vision_encoder\.layers\.\d+\.attn\.qkv",
            r"(?:\w+\.)*qkv",
            "(.*attn)?.*qkv",
            "^(?!.*decoder).*(q|k|v).*$",
            "a.b",
        ],
    )
    def test_usual_ones(self, pattern):
        start = time.perf_counter()
        check_patterns(TALoraConfig(target_modules=pattern), self.NAMES)
        assert time.perf_counter() - start < 0.7

    def test_names_need_no_process(self, monkeypatch):
        started = []
        monkeypatch.setattr("subprocess.run", lambda command, **options: started.append(command))
        check_patterns(LoraConfig(target_modules=["qkv", "layers.0.attn"], modules_to_save=["a_b.c-d"]), self.NAMES)
        assert not started
        check_patterns(LoraConfig(target_modules="qkv|proj"), self.NAMES)
        assert len(started) == 1
