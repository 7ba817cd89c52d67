"""README's Python blocks run in order, as they stand, on a small SAM in the place of the Hub's."""

import re
import runpy
import warnings
from pathlib import Path

import pytest
import torch
from small_models import make_sam

import peft_talora

README = Path(__file__).parents[1] / "README.md"


def python_blocks():
    """[(line, code)] of all blocks."""
    text = README.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, found.start(1)), found[1]) for found in re.finditer(r"```python\n(.*?)```", text, re.S)
    ]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The working directory stands for the Hub: what would be loaded from there and pushed there are folders in it."""
    monkeypatch.chdir(tmp_path)
    # SAM's own input, with few and small tokens
    make_sam(image_size=1024, patch_size=32, num_hidden_layers=12).save_pretrained("facebook/sam-vit-base")
    pushed = []

    def push(model, hub_id, **more):
        pushed.append(hub_id)
        return peft_talora.save_adapter(model, hub_id, **more)

    monkeypatch.setattr(peft_talora, "push_adapter", push)
    return pushed


@pytest.mark.slow
def test_every_block_runs_after_those_above_it(hub):
    namespace, blocks = {"__name__": "readme"}, python_blocks()
    assert len(blocks) > 5
    for line, code in blocks:
        with warnings.catch_warnings():
            # what README shows gives no reason to be warned
            warnings.filterwarnings("error", module=r"readme$|peft_talora\.")
            exec(compile("\n" * line + code, str(README), "exec"), namespace)
    assert hub == ["me/my-adapter"] and Path("my-adapter/README.md").is_file()
    assert namespace["maps"]["depth"].shape[:2] == (1, 1)
    assert not any("talora" in name for name, _ in namespace["merged"].named_parameters())
    assert namespace["depth_sam"].config.vision_config.image_size == 512
    assert sorted(path.name for path in Path("depth-lora").iterdir() if path.suffix != ".md") == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = peft_talora.MSamForMultiTask.from_adapter("my-lora")
    assert loaded.get_base_model().task_specs.keys() == {"semantic", "depth", "normals"}
    assert torch.isfinite(namespace["output"].loss)


def links(text):
    """Where the links and pictures of a Markdown text lead to."""
    return re.findall(r"\]\(([^)\s]+)\)", text)


@pytest.mark.parametrize("name", ["README.md", "examples/README.md"])
def test_links_lead_somewhere(name):
    file = README.parent / name
    for target in links(file.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            path, _, section = target.partition("#")
            found = (file.parent / path) if path else file
            assert found.exists(), target
            headings = re.findall(r"^#+ (.+)$", found.read_text(encoding="utf-8"), re.M) if section else []
            names = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert not section or section in names, target


def test_links_work_from_elsewhere():
    build = runpy.run_path(str(README.parent / ".ci/build"))
    text = README.read_text(encoding="utf-8")
    made = build["absolute_links"](text, "https://github.com/o/n", "v1")
    assert len(links(made)) == len(links(text)) and all(link.startswith("https://") for link in links(made))
    assert "](https://github.com/o/n/raw/v1/examples/images/predictions.png)" in made
    assert "(https://github.com/o/n/blob/v1/examples/README.md#your-own-images-and-labels)" in made
