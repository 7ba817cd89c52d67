"""Compiled submodules under activation checkpointing, with a task that changes."""

import copy

import pytest
import torch
from peft import get_peft_model
from small_models import make_sam
from torch._dynamo.testing import CompileCounterWithBackend

from peft_talora import TALoraConfig


def gradients(model, pixels, tasks):
    """Those of one backward per task, added up."""
    model.zero_grad()
    for task in tasks:
        model.set_task(task)
        model.base_model.model.vision_encoder(pixels).last_hidden_state.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
def test_a_replay_needs_no_graph_of_its_own():
    torch._dynamo.reset()
    model = (
        get_peft_model(
            make_sam(num_hidden_layers=1, global_attn_indexes=[0]),
            TALoraConfig(tasks=["a", "b"], r=4, init_weights=False),
        )
        .double()
        .train()
    )
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = gradients(copy.deepcopy(model), pixels, "ab")
    single = gradients(copy.deepcopy(model), pixels, "a")
    assert any((expected[name] - 2 * single[name]).abs().max() > 1e-6 for name in expected), "the tasks differ"

    model.gradient_checkpointing_enable()
    counter = CompileCounterWithBackend("eager")
    for layer in model.base_model.model.vision_encoder.layers:
        layer.attn.compile(backend=counter)
    model.zero_grad()
    for task in "ab":
        model.set_task(task)
        loss = model.base_model.model.vision_encoder(pixels).last_hidden_state.square().mean()
        graphs = counter.frame_count
        assert graphs
        loss.backward()
        assert counter.frame_count == graphs, "the replay was compiled again"
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)
