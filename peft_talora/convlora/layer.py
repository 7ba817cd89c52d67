"""The Conv-LoRA layer."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..routing.checkpointing import is_replay
from ..tuner.layer import PluginLayer
from ..tuner.low_rank import add_product, project
from ..tuner.tensors import zero_of
from .config import ConvLoraConfig
from .experts import expert_outputs
from .gate import choose
from .grids import Place

MERGE_ERROR = (
    "Conv-LoRA cannot be merged: its update goes through a GELU, mixes neighbouring tokens and picks another expert for "
    "every input, so that no weight of the base layer is equal to it. Keep the adapter for inference (save_pretrained writes "
    "it, PeftModel.from_pretrained loads it), or call unload() to get the base model without it."
)


class _LastForward:
    """What a layer keeps of its last forward, for the auxiliary loss and the usage. Neither copied nor saved.

    Attributes:
        choices (`dict[str, tuple[Tensor, Tensor]]`):
            Per active adapter the expert of each sample (B',) and the balancing loss (), not weighted.
    """

    def __init__(self) -> None:
        self.choices: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _LastForward, ()


class ConvLoraLayer(PluginLayer):
    """The parameters of Conv-LoRA for one linear layer, and what PEFT does with every tuner layer."""

    # All names of layers that may contain (trainable) adapter weights
    adapter_layer_names = (
        "convlora_A",
        "convlora_B",
        "convlora_expert_weight",
        "convlora_expert_bias",
        "convlora_gate",
        "convlora_noise",
    )
    # All names of other parameters that may contain adapter-related parameters
    other_param_names = (
        "r",
        "convlora_alpha",
        "scaling",
        "num_experts",
        "convlora_dropout",
        "noisy_gating",
        "aux_loss_weight",
        "gate_gradient",
        "grid_size",
        "num_prefix_tokens",
    )

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        super().__init__(base_layer, **kwargs)
        self.r: dict[str, int] = {}
        self.convlora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.num_experts: dict[str, int] = {}
        self.noisy_gating: dict[str, bool] = {}
        self.aux_loss_weight: dict[str, float] = {}
        self.gate_gradient: dict[str, bool] = {}
        self.grid_size: dict[str, tuple[int, int] | None] = {}
        self.num_prefix_tokens: dict[str, int] = {}
        self.convlora_dropout = nn.ModuleDict({})
        self.last_forward = _LastForward()
        # what the tuner knows of the input
        self.place = Place()

    def update_layer(self, adapter_name: str, config: ConvLoraConfig, name: str = "") -> None:
        """Add the parameters of the adapter `adapter_name`.

        Args:
            adapter_name: The adapter's name.
            config: The adapter's configuration.
            name: The layer's full name in the model.
        """
        r, n = config.r, config.num_experts
        self.r[adapter_name] = r
        self.scaling[adapter_name] = config.convlora_alpha / r
        for option in ("convlora_alpha", "num_experts", "noisy_gating", "aux_loss_weight", "gate_gradient", "grid_size",
                       "num_prefix_tokens"):  # fmt: skip
            getattr(self, option)[adapter_name] = getattr(config, option)
        dropout = nn.Dropout(p=config.convlora_dropout) if config.convlora_dropout > 0.0 else nn.Identity()
        self.convlora_dropout.update(nn.ModuleDict({adapter_name: dropout}))
        shapes = ((r, self.in_features), (self.out_features, r), (n, r, r, 3, 3), (n, r), (r, n), (r, n))
        for parameters, shape in zip(self.adapter_layer_names, shapes, strict=True):
            getattr(self, parameters)[adapter_name] = nn.Parameter(torch.zeros(shape))

        self.reset_convlora_parameters(adapter_name, config.init_weights)
        self._activate(adapter_name, config)

    @torch.no_grad()
    def reset_convlora_parameters(self, adapter_name: str, init_weights: bool) -> None:
        """Fill the parameters as `ConvLoraConfig.init_weights` says."""
        parameters = self.parameters_of(adapter_name)
        if any(parameter.device.type == "meta" for parameter in parameters):
            return
        A, B, expert_weight, *others = parameters
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        # as nn.Conv2d starts
        for kernel in expert_weight:
            nn.init.kaiming_uniform_(kernel, a=math.sqrt(5))
        for parameter in (B, *others):
            if init_weights:
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter)

    def expert_counts(self, adapter_name: str) -> torch.Tensor | None:
        """How many samples of the last forward each expert got, (n,); None where there was none."""
        if adapter_name not in self.last_forward.choices:
            return None
        index, _ = self.last_forward.choices[adapter_name]
        return F.one_hot(index, self.num_experts[adapter_name]).sum(0)

    def auxiliary_values(self, adapter_name: str) -> torch.Tensor | None:
        """The weighted balancing loss of the last forward, (1,); None where there was none."""
        if adapter_name not in self.last_forward.choices:
            return None
        _, loss = self.last_forward.choices[adapter_name]
        return self.aux_loss_weight[adapter_name] * loss[None]

    def remember(self, choices: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Replace what is kept of the last forward, unless this is a replay of it by activation checkpointing."""
        if torch.compiler.is_compiling() or not is_replay():
            self.last_forward.choices = choices

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove the adapter `adapter_name` and what is kept of the last forward."""
        super().delete_adapter(adapter_name)
        self.last_forward.choices = {}


class ConvLoraLinear(nn.Module, ConvLoraLayer):
    r"""A linear layer W0 (k x d) with a low-rank update and convolutional experts (Conv-LoRA, arXiv 2401.17868, section 3).

        Z = A dropout(x)
        y = W0 x + bias + (alpha / r) B (Z + E_e(Z))
        E_e(Z) = down_s(GELU(conv_e(up_s(Z)))),  s = e + 1,  e in 0..n-1

    A is (r, d), B (k, r), conv_e a 3x3 convolution r -> r with a bias, up_s and down_s bicubic resizing by s. Each sample gets
    one expert, the one with the largest logit; with g the mean of Z over the sample's tokens

        clean = g W_gate,  std = softplus(g W_noise) + 0.01,  logits = clean + N(0, 1) std in training, clean in eval

    W_gate and W_noise are (r, n). They get a gradient from the balancing loss ([`auxiliary_loss`]) and, with
    `gate_gradient`, from the task's loss.

    Input `(..., H, W, d)` with one grid of tokens per sample (SAM's windows are samples of their own), or `(B', N, d)` with N
    = num_prefix_tokens + H W, the grid after the prefix tokens, row by row. Returns `(..., k)`.

    Args:
        base_layer: The linear layer to adapt (`nn.Linear`, or a quantised one that PEFT knows).
        adapter_name: The adapter's name.
        config: The adapter's configuration.
        name: The layer's full name, for error messages.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: ConvLoraConfig, name: str = "", **kwargs: Any
    ) -> None:
        nn.Module.__init__(self)
        ConvLoraLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config=config, name=name)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(..., H, W, d) or (B', N, d) -> (..., k), with the active adapters added up; see the class.

        Raises:
            ValueError: The input has another shape, or its tokens fit no grid.
        """
        if self.disable_adapters:
            self.remember({})
            return self.base_layer(x, *args, **kwargs)

        result = self.base_result(x, *args, **kwargs)
        result_dtype = result.dtype
        choices = {}
        for adapter_name in self.active_adapters:
            if adapter_name in self.convlora_A:
                x = self._cast_input_dtype(x, self.convlora_A[adapter_name].dtype)
                hidden, choices[adapter_name] = self._hidden(adapter_name, x)
                result = add_product(result, hidden, self.convlora_B[adapter_name])
        self.remember(choices)
        return result.to(result_dtype)

    def _hidden(self, adapter_name: str, x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """(alpha / r) (Z + E(Z)) of shape (..., r), and what is kept of the choice of experts."""
        prefix, height, width = self._grid_of(adapter_name, x)
        tokens = project(self.convlora_dropout[adapter_name](x), self.convlora_A[adapter_name])
        grid = tokens[:, prefix:] if prefix else tokens
        grid = grid.reshape(-1, height, width, tokens.shape[-1])

        gate, noise = self.convlora_gate[adapter_name], self.convlora_noise[adapter_name]
        features = grid.mean((1, 2), dtype=torch.promote_types(grid.dtype, torch.float32))
        choice = choose(features, gate, noise, noisy=self.noisy_gating[adapter_name] and self.training)
        # the gate is in the graph of every forward, so that DDP need not look for unused parameters: a zero with zero gradients
        bias = self.convlora_expert_bias[adapter_name] + zero_of(gate) + zero_of(noise)
        expert = expert_outputs(grid, choice.index, self.convlora_expert_weight[adapter_name], bias)
        if self.gate_gradient[adapter_name]:
            expert = expert * choice.factor().to(expert.dtype)[:, None, None, None]

        if prefix:
            expert = F.pad(expert.flatten(1, 2), (0, 0, prefix, 0))
        hidden = (tokens + expert.reshape(tokens.shape)) * self.scaling[adapter_name]
        return hidden, (choice.index, choice.loss)

    def _grid_of(self, adapter_name: str, x: torch.Tensor) -> tuple[int, int, int]:
        """Number of prefix tokens, height and width of the grid in an input (..., H, W, d) or (B', N, d)."""
        asked, prefix = self.grid_size[adapter_name], self.num_prefix_tokens[adapter_name]
        if x.ndim > 3:
            self._check_own_grid(x, asked)
            return 0, x.shape[-3], x.shape[-2]
        if x.ndim < 3:
            raise ValueError(
                f"Conv-LoRA works on grids of tokens: expected an input (..., H, W, {self.in_features}) or (B, N, "
                f"{self.in_features}), got {tuple(x.shape)}. Layers without a grid can be left out with exclude_modules."
            )
        number = x.shape[1] - prefix
        known = asked or self.place.grid
        height, width = known or [math.isqrt(max(number, 0))] * 2
        if height * width != number or number < 1:
            given = f"grid_size={asked}, " if asked else f"the model's is {height} x {width}, " if known else ""
            raise ValueError(
                f"An input (B, N, C) of {tuple(x.shape)} has {x.shape[1]} tokens, {prefix} of them prefix tokens: the other "
                f"{number} are no {'grid' if asked or height != width else 'square grid'} ({given}num_prefix_tokens="
                f"{prefix}). Set grid_size and num_prefix_tokens in ConvLoraConfig."
            )
        if known is None and not torch.compiler.is_compiling():
            warnings.warn(
                f"Conv-LoRA takes the {number} tokens of an input (B, N, C) for a square grid, {height} x {width}. Say "
                "which grid it is with grid_size in ConvLoraConfig.",
                stacklevel=2,
            )
        return prefix, height, width

    def _check_own_grid(self, x: torch.Tensor, asked: tuple[int, int] | None) -> None:
        """Refuse a leading dimension as height where the layer's input is not known to be (..., H, W, d)."""
        if self.place.model_type is not None and not self.place.is_grid and tuple(x.shape[-3:-1]) != asked:
            raise ValueError(
                f"An input of {tuple(x.shape)} is no (..., H, W, C) with the grid_size={asked} of ConvLoraConfig, and in a "
                f"'{self.place.model_type}' nothing else says that it is a grid. Leave the layer out of target_modules."
            )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Not possible: raises NotImplementedError that says why, and what to do instead."""
        raise NotImplementedError(MERGE_ERROR)

    def unmerge(self) -> None:
        """Conv-LoRA is never merged."""
        warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)

    def __repr__(self) -> str:
        return "convlora." + super().__repr__()
