"""Conv-LoRA's part of the auxiliary loss: which forward it belongs to, and what counts."""

import copy

import pytest
import torch
from peft import get_peft_model
from small_models import images
from torch import nn

from peft_talora import (
    ConvLoraConfig,
    MSamForMultiTask,
    TALoraConfig,
    TaskSpec,
    auxiliary_loss,
    checkpoint_context,
    expert_usage,
)
from peft_talora.routing.replay import replaying


def config(**changes):
    return ConvLoraConfig(**{"init_weights": False, "num_experts": 4, **changes})


def tuned(sam, **changes):
    return get_peft_model(sam.double(), config(**changes), autocast_adapter_dtype=False)


def qkv_layers(model):
    return [layer.attn.qkv for layer in model.base_model.model.vision_encoder.layers]


def cv_squared(counts):
    counts = counts.double()
    return counts.var() / (counts.mean() ** 2 + 1e-10)


def from_usage(model, weight=0.01, adapter_name=None):
    """The loss in eval: importance and load are both the counts."""
    return weight * sum(2 * cv_squared(counts) for counts in expert_usage(model, adapter_name).values())


class TestWhatItIs:
    def test_sum_over_the_layers_in_eval(self, sam):
        model = tuned(sam, aux_loss_weight=0.3).eval()
        model(pixel_values=images())
        loss = auxiliary_loss(model)
        assert loss.ndim == 0 and len(expert_usage(model)) == 3
        torch.testing.assert_close(loss, from_usage(model, 0.3), rtol=0, atol=1e-12)

    def test_windows_are_routed_on_their_own(self, sam):
        # 8 x 8 tokens in windows of 3: 9 of them, in the layers that are not global
        model = tuned(sam).eval()
        model(pixel_values=images(2))
        assert [counts.sum().item() for counts in expert_usage(model).values()] == [18, 2, 18]

    def test_sum_over_active_adapters(self, sam):
        model = tuned(sam).eval()
        model.add_adapter("other", config(aux_loss_weight=2.0, num_experts=3), autocast_adapter_dtype=False)
        model.base_model.set_adapter(["default", "other"])
        model(pixel_values=images())
        expected = from_usage(model, 0.01, "default") + from_usage(model, 2.0, "other")
        torch.testing.assert_close(auxiliary_loss(model), expected, rtol=0, atol=1e-12)
        with pytest.raises(ValueError, match="Several adapters are active"):
            expert_usage(model)
        # what an adapter did in an earlier forward does not count while it is not active
        model.set_adapter("other")
        torch.testing.assert_close(auxiliary_loss(model), from_usage(model, 2.0, "other"), rtol=0, atol=1e-12)
        model(pixel_values=images())
        assert expert_usage(model, "default") == {}

    def test_beside_talora(self, sam):
        # one of each in one model, as inject_adapter_in_model allows
        model = nn.ModuleDict({"a": tuned(sam), "b": get_peft_model(nn.Sequential(nn.Linear(4, 4)), TALoraConfig(
            tasks=["t"], r=2, target_modules=["0"], ortho_reg_weight=1.0))})  # fmt: skip
        model["a"].eval()(pixel_values=images())
        parts = auxiliary_loss(model["a"]), auxiliary_loss(model["b"])
        assert all(part > 0 for part in parts)
        torch.testing.assert_close(auxiliary_loss(model), sum(parts).double(), rtol=0, atol=1e-6)

    def test_no_weight_no_loss(self, sam):
        model = tuned(sam, aux_loss_weight=0.0).train()
        model(pixel_values=images())
        assert auxiliary_loss(model).item() == 0

    def test_device_and_data_type(self, sam):
        model = get_peft_model(sam.bfloat16(), config()).train()
        model(pixel_values=images().bfloat16())
        assert auxiliary_loss(model).dtype == torch.float32 and auxiliary_loss(model).device == model.device


class TestWhichForward:
    def test_every_forward_replaces_it(self, sam):
        model = tuned(sam).eval()
        assert auxiliary_loss(model).item() == 0
        losses = []
        for seed in (1, 2, 1):
            model(pixel_values=images(seed=seed))
            losses.append(auxiliary_loss(model).item())
        assert losses[0] == losses[2] != losses[1]

    def test_one_without_gradients_too(self, sam):
        model = tuned(sam).train()
        model(pixel_values=images())
        with torch.no_grad():
            model(pixel_values=images())
        assert auxiliary_loss(model) > 0 and not auxiliary_loss(model).requires_grad

    def test_disabled_adapters_clear_it(self, sam):
        model = tuned(sam).train()
        model(pixel_values=images())
        with model.disable_adapter():
            assert auxiliary_loss(model).item() == 0
            model(pixel_values=images())
        assert auxiliary_loss(model).item() == 0 and expert_usage(model) == {}

    def test_layers_that_are_called_alone(self, sam):
        model = tuned(sam).eval()
        with model.disable_adapter():
            model.base_model.model.vision_encoder(images())
        assert auxiliary_loss(model).item() == 0
        model.base_model.model.vision_encoder(images())
        assert auxiliary_loss(model) > 0

    def test_a_forward_that_does_not_reach_the_layers(self, sam):
        model = tuned(sam).train()
        embedding = model(pixel_values=images()).vision_hidden_states
        embedding = model.base_model.model.get_image_embeddings(images()).detach()
        assert auxiliary_loss(model) > 0
        points = torch.tensor([[[[4.0, 5.0]]]] * 2, dtype=torch.float64)
        model(image_embeddings=embedding, input_points=points)
        assert auxiliary_loss(model).item() == 0 and expert_usage(model) == {}

    def test_deleted_adapter(self, sam):
        model = tuned(sam).eval()
        model.add_adapter("other", config(), autocast_adapter_dtype=False)
        model(pixel_values=images())
        with pytest.warns(UserWarning, match="default was active"):
            model.delete_adapter("default")
        assert auxiliary_loss(model).item() == 0

    def test_unloaded(self, sam):
        model = tuned(sam).eval()
        model(pixel_values=images())
        base = model.unload()
        assert auxiliary_loss(base).item() == 0 and expert_usage(base) == {} and not base._forward_pre_hooks

    def test_copies_start_without(self, sam):
        model = tuned(sam).train()
        model(pixel_values=images())
        other = copy.deepcopy(model)
        assert auxiliary_loss(other).item() == 0 < auxiliary_loss(model).item()
        other(pixel_values=images())
        assert auxiliary_loss(other) > 0


class TestCheckpointing:
    """The replay in backward is none of the model's forwards."""

    def gradients(self, model, two_forwards=False):
        torch.manual_seed(5)
        model.zero_grad()
        output = model(pixel_values=images())
        loss = auxiliary_loss(model)
        if two_forwards:
            with torch.no_grad():
                model(pixel_values=images(3, seed=7))
        kept = [layer.last_forward.choices for layer in qkv_layers(model)]
        (output.pred_masks.square().mean() + 10 * loss).backward()
        assert all(a.last_forward.choices is b for a, b in zip(qkv_layers(model), kept, strict=True))
        assert not replaying()
        return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    @pytest.mark.parametrize("two_forwards", [False, True])
    @pytest.mark.parametrize("preserve", [True, None])
    def test_same_loss_and_gradients(self, sam, two_forwards, preserve):
        model = tuned(sam).train()
        loss, expected = self.gradients(model, two_forwards)
        options = (
            {"use_reentrant": False} if preserve is None else {"use_reentrant": False, "preserve_rng_state": True}
        )
        model.base_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        checkpointed, got = self.gradients(model, two_forwards)
        assert checkpointed == loss > 0
        for name, gradient in expected.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-12)
        assert got["base_model.model.vision_encoder.layers.0.attn.qkv.convlora_gate.default"].abs().max() > 0

    def test_reentrant_is_refused(self, sam):
        model = tuned(sam).train()
        model.base_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        with pytest.raises(ValueError, match="Reentrant"):
            model(pixel_values=images().requires_grad_())

    def test_replay_context_nests_and_ends(self):
        _, replay = checkpoint_context()
        _, inner = checkpoint_context()
        with replay:
            with inner:
                assert replaying()
            assert replaying()
        assert not replaying()
        _, replay = checkpoint_context()
        with pytest.raises(RuntimeError), replay:
            raise RuntimeError
        assert not replaying()


class TestMSam:
    TASKS = {"depth": TaskSpec("depth"), "edges": TaskSpec("binary", loss="structure")}

    def make(self, sam, **changes):
        msam = MSamForMultiTask.from_sam(sam, self.TASKS).double()
        return get_peft_model(msam, config(**changes), autocast_adapter_dtype=False)

    def labels(self):
        return {"depth": torch.rand(2, 1, 32, 32).double(), "edges": (torch.rand(2, 1, 32, 32) > 0.5).double()}

    def test_in_the_loss_without_anything_to_do(self, sam):
        model = self.make(sam, aux_loss_weight=0.7).train()
        output = model(images(), labels=self.labels())
        loss = auxiliary_loss(model)
        assert loss > 0
        tasks = sum(output.losses.values())
        torch.testing.assert_close(output.loss, tasks + loss, rtol=0, atol=1e-12)
        output.loss.backward()
        missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert missing == []
        gates = [layer.convlora_gate["default"].grad for layer in qkv_layers(model)]
        assert all(gate.abs().max() > 0 for gate in gates)

    def test_one_encoder_pass_for_all_tasks(self, sam):
        model = self.make(sam).eval()
        model(images())
        assert [counts.sum().item() for counts in expert_usage(model).values()] == [18, 2, 18]

    def test_from_image_embeddings_there_is_none(self, sam):
        model = self.make(sam).train()
        msam = model.get_base_model()
        model(images(), labels=self.labels()).loss.backward()
        embeddings = {name: e.detach() for name, e in msam.encode(images()).items()}
        assert auxiliary_loss(model) > 0
        output = model(image_embeddings=embeddings, labels=self.labels())
        assert output.loss.item() == sum(output.losses.values()).item()
        output.loss.backward()  # nothing of the earlier graph
