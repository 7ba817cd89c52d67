"""Adapters as training leaves them, to which a task is added."""

import torch
from peft import LoraConfig, get_peft_model
from small_models import images, make_sam, move_saved_modules

from peft_talora import (
    ConvLoraConfig,
    MSamForMultiTask,
    TALoraConfig,
    TALoraLayer,
    TaskSpec,
    default_modules_to_save,
)

TASKS = {"semantic": TaskSpec("semantic", num_channels=3), "depth": TaskSpec("depth")}
CONFIGS = {
    "talora": lambda msam: TALoraConfig(r=3, init_weights=False, ortho_reg_weight=0.1),
    "convlora": lambda msam: ConvLoraConfig(r=2, init_weights=False),
    "lora": lambda msam: LoraConfig(
        r=2, target_modules=["qkv"], init_lora_weights=False, modules_to_save=default_modules_to_save(msam)
    ),
}
EDGES = TaskSpec("binary")


def fresh(kind="talora", tasks=TASKS, mode="prompt"):
    """An adapter as training leaves it."""
    msam = MSamForMultiTask.from_sam(make_sam().double(), tasks, channel_mode=mode)
    model = get_peft_model(msam, CONFIGS[kind](msam), autocast_adapter_dtype=False)
    return move_saved_modules(model).eval()


def in_use(*args, **options):
    """The same, frozen as from_adapter has it: torch multiplies weights that require gradients in another order."""
    return fresh(*args, **options).requires_grad_(False)


@torch.no_grad()
def predict(model, **options):
    return model.eval()(images(3), **options).logits


def assert_equal(got, expected):
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def edge_labels(batch=3):
    labels = torch.ones(batch, 1, 32, 32, dtype=torch.float64)
    labels[..., :4] = 0
    return {"edges": labels}


def train(model, steps=3, **options):
    """The losses of a few steps that decay all they can reach."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-2, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        loss = model(images(3), labels=edge_labels(), **options).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, TALoraLayer)]


def trained_names(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}
