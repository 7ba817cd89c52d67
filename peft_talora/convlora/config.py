"""Configuration of Conv-LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..registration import add_peft_type
from ..saving.tensors import Shape, check_sizes
from ..tuner.checks import check_bool, check_positive_int, check_probability, is_int, is_number
from ..tuner.config import TargetsConfig


@dataclass
class ConvLoraConfig(TargetsConfig):
    """Configuration of a [`ConvLoraModel`]: LoRA with convolutional experts of several scales in its bottleneck.

    The method is described in https://huggingface.co/papers/2401.17868.

    Args:
        r (`int`): The rank of A and B.
        convlora_alpha (`float`): The update is multiplied with convlora_alpha / r.
        num_experts (`int`): Number n of experts; expert e (from 1) works at e times the resolution of the tokens.
        convlora_dropout (`float`): Dropout probability of the adapter's input.
        noisy_gating (`bool`):
            Add noise of a learnt size to the gate's logits in training. Without it the balancing loss has no gradient, and
            the gate is trained by nothing unless `gate_gradient` is set.
        aux_loss_weight (`float`): Weight of the balancing loss, see [`auxiliary_loss`].
        gate_gradient (`bool`):
            Let the task's loss train the gate, too. As published (False) the gate's softmax runs over the one chosen logit,
            so that only the balancing loss reaches the gate: it learns to spread the inputs, not which expert suits them.
            If True, the chosen expert's output is multiplied with its softmax probability among all experts over the same
            value detached. This factor is exactly 1, so that outputs do not change, and the gradient of the logits is
            <output of the expert, its gradient> times (one-hot of the chosen one - softmax): an expert whose output
            lowers the loss becomes more likely for such inputs. The experts that were not chosen are not evaluated; what
            they would have given is not known to the gradient.
        grid_size (`tuple[int, int]`, *optional*):
            Height and width of the grid of tokens of inputs (B, N, C). When None that of the model's configuration (ViT,
            DINOv2, CLIP, ...), in models of your own the square root of N - num_prefix_tokens, with a warning; layers of
            transformers' models whose input is not known to be a grid are refused then. Inputs (..., H, W, C) bring
            their own.
        num_prefix_tokens (`int`):
            How many tokens come before the grid in inputs (B, N, C), such as a class token or registers. They get the low
            rank update without an expert.
        init_weights (`bool`):
            True is the published start (B, the experts' biases and the gate zero: the model is unchanged). False leaves
            nothing zero (for tests).
        target_modules (`list[str]` or `str`, *optional*):
            Names of the modules to adapt, or a regular expression. The fused `qkv` of the vision encoder for SAM
            models when None.
        exclude_modules (`list[str]` or `str`, *optional*): Names or a regular expression of modules to leave alone.
        layers_to_transform (`list[int]` or `int`, *optional*): Adapt only the layers with these indices.
        layers_pattern (`list[str]` or `str`, *optional*): The name of the layers' list, where it is uncommon.
        modules_to_save (`list[str]`, *optional*):
            Further modules that are trained in full and saved. None means for an `MSamForMultiTask` its no-mask
            embeddings, mask decoders and encoder LayerNorms, and nothing for other models; [] means none.
        msam (`dict`, *optional*):
            What an `MSamForMultiTask` needs to be built again from its SAM. Filled by `get_peft_model`.
        saved_by (`dict`, *optional*): Of a file alone: format and checksums. Filled when the adapter is saved.
        task_type, inference_mode, base_model_name_or_path, revision, peft_type, peft_version, auto_mapping:
            PEFT's own, see `peft.PeftConfig`; PEFT fills all of them.

    Raises:
        ValueError: A value is out of its range; the message names it.
    """

    r: int = field(default=3, metadata={"help": "The rank of A and B."})
    convlora_alpha: float = field(default=32, metadata={"help": "The update is multiplied with convlora_alpha / r."})
    num_experts: int = field(
        default=8, metadata={"help": "Number of experts; expert e works at e times the resolution of the tokens."}
    )
    convlora_dropout: float = field(default=0.0, metadata={"help": "Dropout probability of the adapter's input."})
    noisy_gating: bool = field(
        default=True, metadata={"help": "Add noise of a learnt size to the gate's logits in training."}
    )
    aux_loss_weight: float = field(default=0.01, metadata={"help": "Weight of the balancing loss."})
    gate_gradient: bool = field(
        default=False, metadata={"help": "Let the task's loss train the gate, too; outputs do not change."}
    )
    grid_size: tuple[int, int] | None = field(
        default=None,
        metadata={"help": "Height and width of the grid of tokens of inputs (B, N, C); a square when None."},
    )
    num_prefix_tokens: int = field(
        default=0, metadata={"help": "How many tokens come before the grid in inputs (B, N, C)."}
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "True: the published start, an unchanged model. False: nothing zero, for tests."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("CONVLORA")
        for name in ("r", "num_experts"):
            check_positive_int(name, getattr(self, name))
        check_probability("convlora_dropout", self.convlora_dropout)
        if not is_number(self.convlora_alpha) or self.convlora_alpha <= 0:
            raise ValueError(f"`convlora_alpha` must be a positive number, got {self.convlora_alpha!r}.")
        if not is_number(self.aux_loss_weight) or self.aux_loss_weight < 0:
            raise ValueError(f"`aux_loss_weight` must be a number of at least 0, got {self.aux_loss_weight!r}.")
        for name in ("noisy_gating", "gate_gradient", "init_weights"):
            check_bool(name, getattr(self, name))
        prefix = self.num_prefix_tokens
        if not is_int(prefix, 0):
            raise ValueError(f"`num_prefix_tokens` must be an integer of at least 0, got {prefix!r}.")
        self._check_grid_size()

    def settings(self) -> dict[str, Any]:
        """See [`TargetsConfig`]."""
        return {"convlora_alpha": self.convlora_alpha}

    def check_shapes(self, shapes: Mapping[str, Shape]) -> None:
        """See [`TargetsConfig`]."""
        check_sizes("num_experts and r", (self.num_experts, self.r), shapes, "convlora_expert_bias")

    def _check_grid_size(self) -> None:
        if self.grid_size is None:
            return
        if not isinstance(self.grid_size, list | tuple) or len(self.grid_size) != 2:
            raise ValueError(f"`grid_size` must be a height and a width or None, got {self.grid_size!r}.")
        for size in self.grid_size:
            check_positive_int("grid_size", size)
        height, width = self.grid_size
        self.grid_size = (height, width)
