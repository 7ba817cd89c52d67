"""mSAMs in float64 that several tests tune, and a plain loop over their images, tasks and channels."""

import re

import torch
from peft import LoraConfig, get_peft_model
from small_models import move_saved_modules
from torch.func import functional_call

from peft_talora import (
    MSamForMultiTask,
    TALoraConfig,
    TALoraLayer,
    TaskSpec,
    default_modules_to_save,
)

NAMES = ("semantic", "depth", "normals")

CHANNELS = {"semantic": 3, "depth": 1, "normals": 3}


def specs():
    return {
        "semantic": TaskSpec("semantic", num_channels=3),
        "depth": TaskSpec("depth", weight=0.5),
        "normals": TaskSpec("normals", weight=2.0),
    }


def make(sam, tasks=None, **kwargs):
    return MSamForMultiTask.from_sam(sam.double(), tasks or specs(), **kwargs)


def tuned(sam, config=None, **changes):
    arguments = {"r_in": 4, "r_out": 3, "r_task": 2, "init_weights": False, **changes}
    model = get_peft_model(make(sam), config or TALoraConfig(**arguments), autocast_adapter_dtype=False)
    return move_saved_modules(model)


@torch.no_grad()
def predict(model, *args, **kwargs):
    return model(*args, **kwargs).logits


def task_parameters(model, task):
    """What is trained for one task alone, in the active adapter."""
    found = {
        name: parameter
        for name, parameter in model.named_parameters()
        if re.search(rf"(mask_decoders|no_mask_embeds)\.{task}\.", name) and parameter.requires_grad
    }
    assert found
    return found


class Reference:
    """Each task a SAM of its own, W0 + dW_t in its qkv; each channel a dense prompt of its own."""

    def __init__(self, model, sam):
        self.model, self.sam = model, sam
        self.msam = model.get_base_model()

    def encoder_weights(self, t):
        weights = {}
        for index, layer in enumerate(self.msam.vision_encoder.layers):
            qkv = layer.attn.qkv
            if isinstance(qkv, TALoraLayer):
                G, U1, U2, U3 = (getattr(qkv, f"talora_{name}")["default"] for name in ("G", "U1", "U2", "U3"))
                delta = 0.5 * torch.einsum("abc,ia,ob,c->oi", G, U1, U2, U3[t])
                weights[f"layers.{index}.attn.qkv.weight"] = self.sam_qkv(index) + delta
            for norm in ("layer_norm1", "layer_norm2"):
                for name, value in self.saved(getattr(layer, norm)).items():
                    weights[f"layers.{index}.{norm}.{name}"] = value
        return weights

    def sam_qkv(self, index):
        return self.sam.vision_encoder.layers[index].attn.qkv.weight.detach()

    @staticmethod
    def saved(wrapper):
        return dict(wrapper.modules_to_save["default"].named_parameters())

    def __call__(self, pixels):
        return {name: self.task(t, name, pixels) for t, name in enumerate(NAMES)}

    def task(self, t, name, pixels):
        embeds = self.saved(self.msam.no_mask_embeds[name])["weight"]
        decoder = self.saved(self.msam.mask_decoders[name])
        assert embeds.shape == (CHANNELS[name], 8)
        rows = []
        for image in pixels:
            encoder, weights = self.sam.vision_encoder, self.encoder_weights(t)
            embedding = functional_call(encoder, weights, (image[None],)).last_hidden_state
            rows.append(torch.stack([self.channel(embedding, embed, decoder) for embed in embeds]))
        return torch.stack(rows)

    def channel(self, embedding, embed, decoder):
        arguments = {
            "image_embeddings": embedding,
            "image_positional_embeddings": self.sam.get_image_wide_positional_embeddings(),
            "sparse_prompt_embeddings": None,
            "dense_prompt_embeddings": embed[None, :, None, None].expand_as(embedding),
            "multimask_output": False,
        }
        masks, _ = functional_call(self.sam.mask_decoder, decoder, kwargs=arguments)
        return masks[0, 0, 0]


def lora_config(msam):
    return LoraConfig(r=2, target_modules=["qkv"], modules_to_save=default_modules_to_save(msam))


def talora_config(msam):
    return TALoraConfig(r=2)
