"""transformers' own adapter methods, on a SAM, its vision encoder and an mSAM; tasks by the free functions."""

import pytest
import torch
from peft import get_peft_model
from small_models import differ, images
from transformers import SamVisionModel, ViTConfig, ViTModel

from peft_talora import ConvLoraConfig, MSamForMultiTask, TALoraConfig, TaskSpec, set_task, use_task

CONFIGS = {
    "talora": lambda: TALoraConfig(tasks=["depth", "edges"], r=3, init_weights=False),
    "convlora": lambda: ConvLoraConfig(num_experts=2, init_weights=False),
}


def make_vision(sam):
    vision = SamVisionModel(sam.config.vision_config)
    vision.vision_encoder.load_state_dict(sam.vision_encoder.state_dict())
    return vision


MODELS = {
    "sam": lambda sam: sam,
    "sam_vision": make_vision,
    "msam": lambda sam: MSamForMultiTask.from_sam(sam, {"depth": TaskSpec("depth"), "edges": TaskSpec("binary")}),
}


@pytest.fixture(params=sorted(MODELS))
def make_model(request, sam_factory):
    return lambda: MODELS[request.param](sam_factory()).double().eval()


@torch.no_grad()
def embed(model):
    """The image embeddings: what an adapter of the encoder changes."""
    # new layers are made in training mode
    return model.eval().vision_encoder(images()).last_hidden_state


# torch multiplies in another order where a weight requires a gradient
def assert_same(first, second):
    torch.testing.assert_close(first, second, rtol=0, atol=1e-10)


@pytest.mark.parametrize("tuner", sorted(CONFIGS))
def test_add_set_disable_and_delete(make_model, tuner):
    model = make_model()
    before = embed(model)
    outputs = {}
    for name in ("one", "two"):
        model.add_adapter(CONFIGS[tuner](), name)
        assert model.active_adapters() == [name]
        outputs[name] = embed(model)
    assert differ(outputs["one"], before) and differ(outputs["one"], outputs["two"])
    model.set_adapter("one")
    assert_same(embed(model), outputs["one"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad and f"{tuner}_" in name}
    assert len(trained) % 3 == 0 and all(name.endswith(".one") for name in trained)
    model.disable_adapters()
    assert_same(embed(model), before)
    model.enable_adapters()
    model.delete_adapter("two")
    assert_same(embed(model), outputs["one"])
    model.delete_adapter("one")
    assert_same(embed(model), before)


@pytest.mark.parametrize("tuner", sorted(CONFIGS))
def test_save_and_load(make_model, tuner, tmp_path):
    model = make_model()
    model.add_adapter(CONFIGS[tuner](), "one")
    # an mSAM's decoders travel with the adapter
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not (tmp_path / "model.safetensors").exists()
    loaded = make_model()
    loaded.load_adapter(str(tmp_path), "another")
    assert loaded.active_adapters() == ["another"]
    assert_same(embed(loaded), embed(model))
    with torch.no_grad():
        assert_same(torch.cat(flat(loaded)), torch.cat(flat(model)))


def flat(model):
    """All tensors of the model's output on images, as vectors."""
    output = model.eval()(images())
    values = output.logits.values() if hasattr(output, "logits") else [output[0]]
    return [value.flatten() for value in values]


def test_tasks_are_routed_by_the_free_functions(make_model):
    model = make_model()
    model.add_adapter(CONFIGS["talora"](), "one")
    outputs = {}
    for task in ("depth", "edges"):
        set_task(model, task)
        outputs[task] = embed(model)
    assert differ(outputs["depth"], outputs["edges"])
    with use_task(model, "depth"):
        assert_same(embed(model), outputs["depth"])
    with use_task(model, ["edges", "depth"]):
        assert_same(embed(model), torch.stack([outputs["edges"][0], outputs["depth"][1]]))
    # the last task that was set is active again
    assert_same(embed(model), outputs["edges"])


def test_tasks_of_a_vit_with_a_class_token():
    config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=24,
                       patch_size=4)  # fmt: skip
    vit = ViTModel(config).double()
    # q_proj and v_proj are the newer names
    targets = [name for name, _ in vit.named_modules() if name.endswith(("query", "value", "q_proj", "v_proj"))]
    assert len(targets) == 4
    talora = TALoraConfig(tasks=["depth", "edges"], r=3, init_weights=False, target_modules=targets)
    model = get_peft_model(vit, talora).eval()
    pixels = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    outputs = {}
    for task in ("depth", "edges"):
        model.set_task(task)
        outputs[task] = model(pixel_values=pixels).last_hidden_state
    assert differ(outputs["depth"], outputs["edges"])
    mixed = model(pixel_values=pixels, task_ids=["edges", "depth"]).last_hidden_state
    assert_same(mixed, torch.stack([outputs["edges"][0], outputs["depth"][1]]))
