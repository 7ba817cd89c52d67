"""Both tuners on the models of the SAM family: default targets, windows and grids, values and gradients, merge, export."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import NoMatchingPeftModuleError
from small_models import make_sam2, make_sam3, make_sam3_tracker, make_sam_hq
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from peft_talora import ConvLoraConfig, ConvLoraLinear, TALoraConfig, TALoraLinear, auxiliary_loss, use_task
from peft_talora.export import save_task_as_lora, task_to_lora

TASKS = ["a", "b", "c"]
TEXT = torch.tensor([[1, 2, 3]])
# the model, the start of its targets' names, their number, and their ends
MODELS = {
    "sam_hq": (make_sam_hq, "vision_encoder.layers.", 4, ("attn.qkv",)),
    "sam_hq_vision": (lambda: make_sam_hq().vision_encoder, "layers.", 4, ("attn.qkv",)),
    "sam2": (make_sam2, "vision_encoder.backbone.blocks.", 7, ("attn.qkv",)),
    "sam2_vision": (lambda: make_sam2().vision_encoder, "backbone.blocks.", 7, ("attn.qkv",)),
    "sam2_hiera": (lambda: make_sam2().vision_encoder.backbone, "blocks.", 7, ("attn.qkv",)),
    "sam3": (make_sam3, "vision_encoder.backbone.layers.", 6, ("attention.q_proj", "attention.v_proj")),
    "sam3_vision": (
        lambda: make_sam3_tracker().vision_encoder,
        "backbone.layers.",
        6,
        ("attention.q_proj", "attention.v_proj"),
    ),
    "sam3_vit": (
        lambda: make_sam3_tracker().vision_encoder.backbone,
        "layers.",
        6,
        ("attention.q_proj", "attention.v_proj"),
    ),
    "sam3_tracker": (
        make_sam3_tracker,
        "vision_encoder.backbone.layers.",
        6,
        ("attention.q_proj", "attention.v_proj"),
    ),
}


def make(family):
    return MODELS[family][0]().double()


def images(family, batch=2):
    size = 64 if family.startswith("sam2") else 32
    return torch.randn(batch, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def run(model, pixels, **kwargs):
    """One tensor per forward, to which all of the model contributes: (B, ...)."""
    if model.config.model_type == "sam3":
        text = TEXT.expand(len(pixels), -1)
        kwargs |= {"input_ids": text, "attention_mask": torch.ones_like(text)}
    output = model(pixel_values=pixels, **kwargs)
    return output.pred_masks if hasattr(output, "pred_masks") else output.last_hidden_state


def tuned(family, **changes):
    config = TALoraConfig(tasks=TASKS, **{"r_in": 3, "r_out": 4, "r_task": 2, "init_weights": False, **changes})
    return get_peft_model(make(family), config, autocast_adapter_dtype=False).eval()


def tuned_layers(model, kind):
    return {name: layer for name, layer in model.get_base_model().named_modules() if isinstance(layer, kind)}


def assert_same(got, expected, atol=1e-10):
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=atol)


def differ(first, second):
    return (first - second).abs().max().item() > 1e-3


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize(
    ("config", "kind"), [(TALoraConfig(tasks=TASKS), TALoraLinear), (ConvLoraConfig(), ConvLoraLinear)]
)
class TestDefaultTargets:
    def test_the_attention_of_the_vision_encoder_and_nothing_else(self, family, config, kind):
        model = get_peft_model(make(family), copy.deepcopy(config))
        _, start, number, ends = MODELS[family]
        names = list(tuned_layers(model, kind))
        assert len(names) == number
        for name in names:
            assert name.startswith(start) and name.removeprefix(start).partition(".")[2] in ends

    def test_layers_to_transform(self, family, config, kind):
        config = copy.deepcopy(config)
        config.layers_to_transform = [0, 2]
        _, start, _, ends = MODELS[family]
        names = list(tuned_layers(get_peft_model(make(family), config), kind))
        assert sorted(names) == sorted(f"{start}{index}.{end}" for index in (0, 2) for end in ends)


@pytest.mark.parametrize(
    "layers", [{"layers_to_transform": 1}, {"layers_to_transform": [1], "layers_pattern": "blocks"}]
)
def test_a_bare_encoder_with_a_pattern_of_its_own(layers):
    names = list(tuned_layers(tuned("sam2_hiera", target_modules=["mlp.proj_in"], **layers), TALoraLinear))
    assert names == ["blocks.1.mlp.proj_in"]
    with pytest.raises(NoMatchingPeftModuleError, match="layers"):
        tuned("sam2_hiera", layers_to_transform=[1], layers_pattern="layers")


def test_separate_projections_have_no_thirds():
    with pytest.raises(ValueError, match=r"layers.0.attention.q_proj' is one of separate ones: .* target_modules"):
        tuned("sam3_tracker", enable_qkv=[True, False, True])
    assert tuned("sam2", enable_qkv=[True, False, True]) is not None


def reference_weights(layers, task):
    """W0 + dW_t of all layers, the sum written out as the paper has it; differentiable."""
    weights = {}
    for name, layer in layers.items():
        G, U1, U2, U3 = (getattr(layer, f"talora_{factor}")["default"] for factor in ("G", "U1", "U2", "U3"))
        delta = torch.einsum("abc,ia,ob,c->oi", G, U1, U2, U3[task])
        weights[f"{name}.weight"] = layer.get_base_layer().weight + layer.scaling["default"] * delta
    return weights


@pytest.mark.parametrize("family", MODELS)
def test_mixed_tasks_against_a_plain_reference(family):
    model, pixels = tuned(family), images(family, batch=4)
    layers, plain = tuned_layers(model, TALoraLinear), make(family)
    ids = [2, 0, 1, 0]
    expected = torch.cat(
        [
            run(_Functional(plain, reference_weights(layers, task)), pixels[row : row + 1])
            for row, task in enumerate(ids)
        ]
    )
    got = run(model, pixels, task_ids=torch.tensor(ids))
    assert differ(got[1], run(model, pixels, task_ids=[0, 1, 1, 0])[1])
    assert_same(got, expected)

    cotangent = torch.randn_like(got)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for ours, theirs in zip(
        torch.autograd.grad(got, parameters, cotangent),
        torch.autograd.grad(expected, parameters, cotangent),
        strict=True,
    ):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8 * theirs.abs().max().item())


class _Functional:
    """A model with other weights."""

    def __init__(self, model, weights):
        self.model, self.weights, self.config = model, weights, model.config

    def __call__(self, **kwargs):
        return functional_call(self.model, self.weights, (), kwargs)


@pytest.mark.parametrize("family", MODELS)
def test_merged(family):
    model, pixels = tuned(family), images(family)
    with torch.no_grad():
        expected = {}
        for task in TASKS:
            model.set_task(task)
            expected[task] = run(model, pixels)
        assert differ(expected["a"], expected["b"]) and differ(expected["b"], expected["c"])
        model.set_task("b")
        model.merge_adapter()
        assert_same(run(model, pixels), expected["b"], atol=1e-9)
        model.unmerge_adapter()
        model.set_task("c")
        assert_same(run(model, pixels), expected["c"], atol=1e-9)
        plain = model.merge_and_unload()
        assert not any(isinstance(module, TALoraLinear) for module in plain.modules())
        assert_same(run(plain, pixels), expected["c"], atol=1e-9)


@pytest.mark.parametrize("family", MODELS)
def test_a_task_as_stock_lora(family, tmp_path):
    model, pixels = tuned(family), images(family)
    names = list(tuned_layers(model, TALoraLinear))
    with torch.no_grad():
        for task in ("a", "c"):
            config, state = task_to_lora(model, task)
            assert sorted(config.target_modules) == sorted(names) and len(state) == 2 * len(names)
            save_task_as_lora(model, task, tmp_path / task)
            plain = PeftModel.from_pretrained(make(family), tmp_path / task, autocast_adapter_dtype=False).eval()
            with use_task(model, task):
                assert_same(run(plain, pixels), run(model, pixels), atol=1e-9)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("tuner", ["talora", "convlora"])
def test_gradient_checkpointing(family, tuner):
    def gradients(checkpointing):
        torch.manual_seed(0)
        if tuner == "talora":
            model = tuned(family).train()
        else:
            config = ConvLoraConfig(r=2, num_experts=3, noisy_gating=False, init_weights=False)
            model = get_peft_model(make(family), config, autocast_adapter_dtype=False).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            # transformers asks it of the model, and of SAM 2 and 3 says no, although their blocks can
            model.get_base_model().supports_gradient_checkpointing = True
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        pixels = images(family)
        if tuner == "talora":
            first, second = run(model, pixels, task_ids=[0, 2]), run(model, pixels, task_ids=[1, 1])
            (first.square().mean() + second.square().mean()).backward()
        else:
            (run(model, pixels).square().mean() + auxiliary_loss(model)).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    assert any(gradient.abs().max() > 0 for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_compiled():
    # SAM 3's encoder compiles as well, in a minute
    encoder = make_sam2(blocks_per_stage=[1, 1, 1, 1]).vision_encoder.backbone.double()
    config = TALoraConfig(tasks=TASKS, r=3, init_weights=False)
    model = get_peft_model(encoder, config, autocast_adapter_dtype=False).eval()
    pixels = images("sam2")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for ids in ([0, 1], [2, 2]):
        task_ids = torch.tensor(ids)
        assert_same(run(compiled, pixels, task_ids=task_ids), run(model, pixels, task_ids=task_ids))


class _PlainConvLora(nn.Module):
    """The formula in eval, sample by sample on maps that are resized; x (B, H, W, d)."""

    def __init__(self, layer):
        super().__init__()
        self.base, self.scaling = layer.get_base_layer(), layer.scaling["default"]
        names = ("A", "B", "expert_weight", "expert_bias", "gate")
        self.parts = [getattr(layer, f"convlora_{name}")["default"] for name in names]
        self.shapes = []

    def forward(self, x):
        self.shapes.append(tuple(x.shape))
        A, B, weight, bias, gate = self.parts
        rows = []
        for z in x @ A.T:
            expert = int((z.mean((0, 1)) @ gate).argmax())
            fine = z.permute(2, 0, 1)[None]
            if expert:
                fine = F.interpolate(fine, scale_factor=expert + 1, mode="bicubic", align_corners=False)
            fine = F.gelu(F.conv2d(fine, weight[expert], bias[expert], padding=1))
            if expert:
                fine = F.interpolate(fine, size=z.shape[:2], mode="bicubic", align_corners=False)
            rows.append(z + fine[0].permute(1, 2, 0))
        return self.base(x) + self.scaling * torch.stack(rows) @ B.T


@pytest.mark.parametrize("family", MODELS)
def test_conv_lora_on_the_grids_of_the_windows(family):
    config = ConvLoraConfig(r=2, convlora_alpha=2, num_experts=3, init_weights=False)
    model = get_peft_model(make(family), config, autocast_adapter_dtype=False).eval()
    pixels, plain = images(family), copy.deepcopy(model)
    with torch.no_grad():
        with model.disable_adapter():
            base = run(model, pixels)
        references = {}
        for name, layer in tuned_layers(plain, ConvLoraLinear).items():
            references[name] = _PlainConvLora(layer)
            plain.get_base_model().set_submodule(name, references[name])
        expected = run(plain.get_base_model(), pixels)
        got = run(model, pixels)
    assert differ(got, base)
    assert_same(got, expected, atol=1e-8)
    # windows, their padding included, and whole grids
    assert len({shape[:3] for reference in references.values() for shape in reference.shapes}) > 1
