"""A linear layer with TA-LoRA, and its formula written out."""

import torch
from peft import get_peft_model
from torch import nn

from peft_talora import TALoraConfig

FACTORS = ("G", "U1", "U2", "U3")


def tuned_linear(in_features=10, out_features=12, tasks=("a", "b", "c"), bias=True, **config):
    """A tuned linear layer in float64 with nothing zero; (PeftModel, its TALoraLinear)."""
    base = nn.Sequential(nn.Linear(in_features, out_features, bias=bias)).double()
    arguments = {"r_in": 4, "r_out": 3, "r_task": 2, "init_weights": False, **config}
    config = TALoraConfig(tasks=list(tasks), target_modules=["0"], **arguments)
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    return model, model.base_model.model[0]


def factors_of(layer, adapter="default"):
    return [getattr(layer, f"talora_{name}")[adapter] for name in FACTORS]


def reference_delta(layer, task, enabled=None):
    """dW_t entry by entry, as the formula stands in the paper."""
    G, U1, U2, U3 = factors_of(layer)
    delta = torch.einsum("abc,ia,ob,c->oi", G, U1, U2, U3[task]) * layer.scaling["default"]
    if enabled is None:
        return delta
    third, parts = layer.out_features // 3, []
    rows = iter(delta.split(third))
    for on in enabled:
        parts.append(next(rows) if on else delta.new_zeros(third, delta.shape[1]))
    return torch.cat(parts)


def reference_forward(layer, x, tasks, enabled=None):
    """One sample at a time, with dW_t built in full; x (rows, ..., d), one task per row."""
    base = layer.get_base_layer()
    rows = [
        nn.functional.linear(row, base.weight + reference_delta(layer, task, enabled), base.bias)
        for row, task in zip(x, tasks, strict=True)
    ]
    return torch.stack(rows)


def gradients(output, cotangent, inputs):
    return torch.autograd.grad(output, inputs, cotangent)
