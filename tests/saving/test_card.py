"""The model card says what the adapter is, how good it is, and how to load it, and the Hub can read it."""

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from peft_talora import ConvLoraConfig, MSamForMultiTask, TALoraConfig, TaskSpec, default_modules_to_save, save_adapter
from peft_talora.saving.card import escaped, is_hub_id

TASKS = {
    "semantic": TaskSpec("semantic", num_channels=3, class_names=["wall", "floor", "door"]),
    "depth": TaskSpec("depth"),
    "a_normals": TaskSpec("normals"),
    "parts": TaskSpec("parts", num_channels=2),
}


def talora(msam):
    return TALoraConfig(r=2, r_task=2)


def convlora(msam):
    return ConvLoraConfig(r=2, num_experts=2)


def lora(msam):
    return LoraConfig(r=2, target_modules=["qkv"], modules_to_save=default_modules_to_save(msam))


def save(sam, directory, make_config=talora, tasks=TASKS, **kwargs):
    """The model card of a saved adapter."""
    msam = MSamForMultiTask.from_sam(sam, tasks, image_size=48)
    return (save_adapter(get_peft_model(msam, make_config(msam)), directory, **kwargs) / "README.md").read_text()


def code_of(card):
    return card.partition("```python\n")[2].partition("```")[0]


class TestText:
    def test_what_it_is(self, sam, tmp_path):
        card = save(sam, tmp_path)
        assert "# TA-LoRA adapter of a Segment Anything Model for semantic, depth, a_normals, parts" in card
        assert "- image size: 48 pixels" in card and "- base model: not recorded" in card
        assert "- licence: apache-2.0" in card
        assert "| task | kind | channels | classes |\n|---|---|---|---|\n" in card
        assert "| semantic | semantic | 3 | wall, floor, door |" in card
        assert "| depth | depth | 1 | - |" in card and "| a_normals | normals | 3 | - |" in card

    def test_how_to_load_it(self, sam, tmp_path):
        # first of all the import, without which PEFT does not know the adapter
        for hub_id in (None, "somebody/adapter"):
            code = code_of(save(sam, tmp_path / str(hub_id), hub_id=hub_id))
            assert code.startswith("from peft_talora import ")
            compile(code, "card", "exec")
            assert ('from_adapter("somebody/adapter"' in code) == (hub_id is not None)
            assert "base_model=" in code  # this SAM has no name

    def test_a_base_in_a_directory(self, sam, tmp_path):
        sam.save_pretrained(tmp_path / "sam")
        card = save(tmp_path / "sam", tmp_path / "adapter")
        # a local directory means nothing on the Hub
        assert f"- base model: {tmp_path / 'sam'}" in card and "base_model" not in card
        assert "base_model=" in code_of(save(tmp_path / "sam", tmp_path / "adapter", hub_id="somebody/adapter"))

    def test_sizes_also_where_it_is_frozen(self, sam, tmp_path):
        card = save(sam, tmp_path)
        weights = tmp_path / "adapter_model.safetensors"
        saved = sum(value.numel() for value in load_file(weights).values())
        assert f"parameters saved: {saved:,} of" in card and f", {weights.stat().st_size:,} bytes" in card
        again = save_adapter(MSamForMultiTask.from_adapter(tmp_path, base_model=sam), tmp_path / "again")
        assert f"parameters saved: {saved:,} of" in (again / "README.md").read_text()

    def test_metrics(self, sam, tmp_path):
        metrics = {"depth": {"abs_err": 0.12345, "rmse": None, "rel_err": float("nan")}, "semantic": {"miou": 0.5}}
        card = save(sam, tmp_path, metrics=metrics, dataset="tanganke/nyuv2")
        assert "Measured on: tanganke/nyuv2\n" in card and "| semantic | miou | 0.5 |" in card
        assert "| depth | abs_err | 0.1235 |" in card and "rmse" not in card and "rel_err" not in card

    def test_odd_names_of_classes(self, sam, tmp_path):
        odd = ["a | b", "<b>c</b>", "`d`\n# e", "[f](g)", "*h* _i_ k_l", "ä \\ & $m$", "---"]
        card = save(sam, tmp_path, tasks={"t": TaskSpec("semantic", num_channels=len(odd), class_names=odd)})
        row = next(line for line in card.splitlines() if line.startswith("| t | semantic"))
        shown = r"a \| b, \<b\>c\</b\>, \`d\` \# e, \[f\](g), \*h\* \_i\_ k_l, ä \\ \& \$m\$, ---"
        assert row == f"| t | semantic | 7 | {shown} |"
        assert ModelCard.load(tmp_path / "README.md").data.tags == ["peft", "ta-lora", "segment-anything"]


class TestMetadata:
    @pytest.mark.parametrize(
        ("make_config", "name", "tag"),
        [(talora, "TA-LoRA", "ta-lora"), (convlora, "Conv-LoRA", "conv-lora"), (lora, "LoRA", "lora")],
    )
    def test_the_hub_can_read_it(self, sam, tmp_path, make_config, name, tag):
        sam.name_or_path = sam.config._name_or_path = "facebook/sam-vit-base"
        text = save(sam, tmp_path, make_config, license="mit")
        assert text.startswith("---\n") and f"# {name} adapter of" in text
        data = ModelCard.load(tmp_path / "README.md").data
        assert data.library_name == "peft" and data.license == "mit" and data.eval_results is None
        assert data.base_model == "facebook/sam-vit-base" and data.tags == ["peft", tag, "segment-anything"]
        assert "- base model: facebook/sam-vit-base" in text and "base_model=" not in code_of(text)

    def test_metrics_are_evaluation_results(self, sam, tmp_path):
        metrics = {
            "semantic": {"miou": 0.5, "pixel_accuracy": 0.75},
            "depth": {"rmse": 0.25, "abs_err": None},
            "a_normals": {"mean_angle": 20.0},
            "parts": {"miou": 0.125},
        }
        save(sam, tmp_path, metrics=metrics, dataset="tanganke/nyuv2", hub_id="somebody/adapter")
        data = ModelCard.load(tmp_path / "README.md").data
        assert data.model_name == "somebody/adapter" and data.datasets == ["tanganke/nyuv2"]
        assert {(r.task_type, r.metric_name, r.metric_type, r.metric_value) for r in data.eval_results} == {
            ("image-segmentation", "semantic: miou", "miou", 0.5),
            ("image-segmentation", "semantic: pixel_accuracy", "pixel_accuracy", 0.75),
            ("image-segmentation", "parts: miou", "miou", 0.125),
            ("depth-estimation", "depth: rmse", "rmse", 0.25),
            ("image-to-image", "a_normals: mean_angle", "mean_angle", 20.0),
        }
        assert {result.dataset_name for result in data.eval_results} == {"tanganke/nyuv2"}

    def test_metrics_of_an_unknown_dataset(self, sam, tmp_path):
        save(sam, tmp_path, metrics={"depth": {"rmse": 1}})
        data = ModelCard.load(tmp_path / "README.md").data
        assert [result.dataset_name for result in data.eval_results] == ["not recorded"] and data.datasets is None

    def test_values_that_are_yaml_themselves(self, sam, tmp_path):
        save(sam, tmp_path, metrics={"depth": {"rmse": 1.0}}, dataset='a: "b"\n---\n# c', license="other: yes")
        data = ModelCard.load(tmp_path / "README.md").data
        assert data.license == "other: yes" and data.eval_results[0].dataset_name == 'a: "b"\n---\n# c'


def test_is_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("facebook/sam-vit-base") and is_hub_id("sam")
    (tmp_path / "sam").mkdir()
    for name in ("sam", str(tmp_path), "/gone/sam", "a/b/c", "a b", "", None):
        assert not is_hub_id(name), name


def test_escaped_text_is_one_line():
    assert escaped("a\r\n\tb |") == r"a b \|"
