"""The tuner as PEFT and transformers use it: parameters, several adapters, files, other backbones, several processes."""

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from process_groups import run_in_processes
from small_models import adapter_size, differ, images, train
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)

from peft_talora import (
    ConvLoraConfig,
    ConvLoraLayer,
    ConvLoraLinear,
    MSamForMultiTask,
    TaskSpec,
    auxiliary_loss,
    expert_usage,
    load_adapter,
    save_adapter,
)


def config(**changes):
    return ConvLoraConfig(**{"init_weights": False, "num_experts": 4, **changes})


def tuned(sam, **changes):
    return get_peft_model(sam.double(), config(**changes), autocast_adapter_dtype=False).eval()


@torch.no_grad()
def predict(model, pixels):
    return model(pixel_values=pixels).pred_masks


class TestParameterCounts:
    """On SAM's own sizes, decoder excluded: 23,040 (H) and 8,640 (B) for experts and gates beside LoRA of rank 3."""

    @pytest.mark.parametrize(
        ("hidden_size", "layers", "heads", "beside_lora"),
        [(768, 12, 12, 8_640), (1024, 24, 16, 17_280), (1280, 32, 16, 23_040)],
        ids=["B", "L", "H"],
    )
    def test_beside_lora(self, hidden_size, layers, heads, beside_lora):
        lora = adapter_size(LoraConfig(r=3, target_modules=["qkv"]), hidden_size, layers, heads)
        conv = adapter_size(ConvLoraConfig(), hidden_size, layers, heads)
        assert lora == layers * 3 * 4 * hidden_size
        assert conv - lora == beside_lora == layers * (8 * 9 * 9 + 8 * 3 + 2 * 3 * 8)


class TestBareSam:
    def test_only_the_adapter_is_trained_and_all_of_it(self, sam):
        model = tuned(sam).train()
        output = model(pixel_values=images())
        (output.pred_masks.sum() + auxiliary_loss(model)).backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == (".convlora_" in name) == parameter.requires_grad
            assert parameter.grad is None or parameter.grad.abs().max() > 0

    def test_default_targets(self, sam):
        model = tuned(sam)
        names = [name for name, module in model.named_modules() if isinstance(module, ConvLoraLinear)]
        assert names == [f"base_model.model.vision_encoder.layers.{i}.attn.qkv" for i in range(3)]
        assert repr(model.base_model.model.vision_encoder.layers[0].attn.qkv).startswith("convlora.ConvLoraLinear")

    def test_disable_and_unload(self, sam):
        pixels = images()
        before = predict(sam.double(), pixels)
        model = tuned(sam)
        assert differ(predict(model, pixels), before)
        with model.disable_adapter():
            torch.testing.assert_close(predict(model, pixels), before, rtol=0, atol=1e-12)
        base = model.unload()
        assert base is sam and not any(isinstance(module, ConvLoraLayer) for module in base.modules())
        torch.testing.assert_close(predict(base, pixels), before, rtol=0, atol=1e-12)

    def test_merge_and_unload_leaves_the_model_as_it_is(self, sam):
        model, pixels = tuned(sam), images()
        before = predict(model, pixels)
        for call in (model.merge_and_unload, model.merge_adapter):
            with pytest.raises(NotImplementedError, match="cannot be merged"):
                call()
        assert torch.equal(predict(model, pixels), before)

    def test_mixed_adapter_batches_are_refused(self, sam):
        with pytest.raises(ValueError, match="adapter_names"):
            tuned(sam)(pixel_values=images(), adapter_names=["default", "default"])

    def test_training_lowers_the_loss(self, sam):
        model = tuned(sam, init_weights=True).train()

        def loss():
            return (model(pixel_values=images()).pred_masks.mean() - 1).square() + auxiliary_loss(model)

        losses = train(model, loss, steps=12)
        assert losses[-1] < losses[0]


class TestSeveralAdapters:
    def test_switching_and_adding_up(self, sam):
        model, pixels = tuned(sam), images()
        model.add_adapter("other", config(r=2, num_experts=3), autocast_adapter_dtype=False)
        outputs = {}
        for name in ("default", "other"):
            model.set_adapter(name)
            outputs[name] = predict(model, pixels)
            trainable = {n.rsplit(".", 1)[1] for n, p in model.named_parameters() if p.requires_grad}
            assert trainable == {name}
        assert differ(outputs["default"], outputs["other"])
        layer = model.base_model.model.vision_encoder.layers[0].attn.qkv
        x = torch.randn(2, 5, 5, 16, dtype=torch.float64)
        parts = []
        for name in ("default", "other"):
            model.set_adapter(name)
            parts.append(layer(x) - layer.base_layer(x))
        model.base_model.set_adapter(["default", "other"])
        torch.testing.assert_close(layer(x), layer.base_layer(x) + sum(parts), rtol=0, atol=1e-10)
        model.delete_adapter("other")
        torch.testing.assert_close(predict(model, pixels), outputs["default"], rtol=0, atol=1e-12)


class TestFiles:
    def test_saved_and_loaded(self, sam_factory, tmp_path):
        model, pixels = tuned(sam_factory(), r=2, gate_gradient=True), images()
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(sam_factory().double(), tmp_path, autocast_adapter_dtype=False).eval()
        assert loaded.peft_config["default"].gate_gradient is True
        torch.testing.assert_close(predict(loaded, pixels), predict(model, pixels), rtol=0, atol=1e-12)

    def test_transformers_and_inject(self, sam_factory):
        pixels = images()
        sam = sam_factory().double()
        before = predict(sam, pixels)
        sam.add_adapter(config())
        assert differ(predict(sam, pixels), before) and auxiliary_loss(sam) > 0 and len(expert_usage(sam)) == 3
        injected = inject_adapter_in_model(config(), sam_factory().double())
        assert differ(predict(injected, pixels), before) and len(expert_usage(injected)) == 3

    def test_msam_end_to_end(self, sam_factory, tmp_path):
        tasks = {"semantic": TaskSpec("semantic", 3), "depth": TaskSpec("depth")}
        msam = MSamForMultiTask.from_sam(sam_factory(), tasks)
        model = get_peft_model(msam, config(init_weights=True)).train()
        saved = model.peft_config["default"].modules_to_save
        assert "mask_decoders.depth" in saved and "vision_encoder.layers.0.layer_norm1" in saved
        pixels = images().float()
        labels = {"semantic": torch.randint(3, (2, 32, 32)), "depth": torch.rand(2, 1, 32, 32) + 1}
        losses = train(model, lambda: model(pixels, labels=labels).loss, steps=8, lr=3e-3)
        assert losses[-1] < losses[0]
        save_adapter(model, tmp_path / "adapter")
        loaded = load_adapter(tmp_path / "adapter", base_model=sam_factory()).eval()
        model.eval()
        with torch.no_grad():
            for name, logits in model(pixels).logits.items():
                torch.testing.assert_close(loaded(pixels).logits[name], logits, rtol=1e-4, atol=1e-4)


class TestOtherBackbones:
    """Token sequences of transformers' vision models."""

    SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
             "image_size": 24, "patch_size": 4}  # fmt: skip

    @pytest.mark.parametrize(
        ("make", "targets", "expected"),
        [
            (lambda s: ViTModel(ViTConfig(**s)), ["query", "value", "q_proj", "v_proj"], 4),
            (lambda s: Dinov2Model(Dinov2Config(**s)), ["query", "value", "q_proj", "v_proj"], 4),
            (lambda s: CLIPVisionModel(CLIPVisionConfig(**s)), ["q_proj", "v_proj"], 4),
        ],
        ids=["vit", "dinov2", "clip"],
    )
    def test_trained_with_a_class_token(self, make, targets, expected):
        model = get_peft_model(make(self.SIZES), config(target_modules=targets, num_prefix_tokens=1))
        output = model(pixel_values=torch.randn(2, 3, 24, 24)).last_hidden_state
        (output.square().mean() + auxiliary_loss(model)).backward()
        usage = expert_usage(model)
        assert len(usage) == expected and all(counts.sum() == 2 for counts in usage.values())
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

    def test_a_forgotten_class_token_is_named(self):
        model = get_peft_model(CLIPVisionModel(CLIPVisionConfig(**self.SIZES)), config(target_modules=["q_proj"]))
        with pytest.raises(ValueError, match=r"has 37 tokens.*no square grid.*num_prefix_tokens in ConvLoraConfig"):
            model(pixel_values=torch.randn(2, 3, 24, 24))

    def test_only_linear_layers(self):
        with pytest.raises(TypeError, match="Conv2d"):
            get_peft_model(nn.Sequential(nn.Conv2d(3, 3, 3)), config(target_modules=["0"]))


def _compare_with_one_process(noisy):
    """The gradients that two processes agree on are those of each one's batch alone, averaged."""

    def make():
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()
        model = get_peft_model(
            base, config(target_modules=["0", "2"], noisy_gating=noisy), autocast_adapter_dtype=False
        )
        return model.train()

    rank = dist.get_rank()
    model = DistributedDataParallel(make())
    data = [torch.randn(3, 4, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(r)) for r in range(2)]
    for step in range(3):
        torch.manual_seed(rank)
        model.zero_grad()
        output = model(data[rank])
        # the second step without the balancing loss: nothing but the zeros reaches the gate
        (output.square().mean() + (0 if step == 1 else auxiliary_loss(model))).backward()
    got = {n: p.grad for n, p in model.module.named_parameters() if p.requires_grad}
    expected = {}
    for r in range(2):
        alone = make()
        torch.manual_seed(r)
        (alone(data[r]).square().mean() + auxiliary_loss(alone)).backward()
        for name, parameter in alone.named_parameters():
            if parameter.requires_grad:
                expected[name] = expected.get(name, 0) + parameter.grad / 2
    assert got.keys() == expected.keys() and len(got) == 12
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)
    assert any(g.abs().max() > 0 for n, g in got.items() if "gate" in n) == noisy


@pytest.mark.slow
@pytest.mark.parametrize("noisy", [True, False])
def test_two_processes_without_looking_for_unused_parameters(noisy):
    run_in_processes(_compare_with_one_process, noisy, number=2)
