"""SAM's attention without the N x N position bias."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.sam.modeling_sam import SamVisionAttention, SamVisionSdpaAttention
from transformers.models.sam_hq.modeling_sam_hq import SamHQVisionAttention, SamHQVisionSdpaAttention

from .tiled import tiled_attention

# the flash kernels of GPUs want channels in multiples of it
ALIGNMENT = 8


class LeanAttention(nn.Module):
    r"""SAM's attention with decomposed relative positions, in memory linear in the number of tokens N = H W.

    Query i at (y, x) and key j at (y', x') have the logit

        scale * <q_i, k_j> + h_i[y'] + w_i[x'],      h_i[y'] = <q_i, R_h[y - y']>,   w_i[x'] = <q_i, R_w[x - x']>

    and transformers adds h and w as a tensor of N x N per image and head. But that sum is one scalar product,

        < (scale * q_i, h_i, w_i), (k_j, onehot(y'), onehot(x')) >

    of H + W more channels, so that `scaled_dot_product_attention` needs no mask and its flash kernels apply. The products are
    larger then, which costs GPUs less than the N x N tensor and CPUs more: those go [`tile by tile`][tiled_attention].

    It comes before the model's own attention among the bases.
    """

    # transformers' sdpa attention has none
    has_dropout: bool

    def forward(
        self, hidden_states: torch.Tensor, output_attentions: bool | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, H, W, D) -> (B, H, W, D), and no attention weights: they are never there as a whole."""
        batch_size, height, width, _ = hidden_states.shape
        qkv = self.qkv(hidden_states).reshape(batch_size, height * width, 3, self.num_attention_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.dropout if self.training and self.has_dropout else 0.0
        if not self.use_rel_pos:
            output = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=self.scale)
        else:
            rows, columns = self._position_logits(query, height, width)
            if dropout == 0.0 and _prefers_tiles(query):
                output = tiled_attention(query, key, value, rows, columns, self.scale)
            else:
                output = _attend_without_mask(query * self.scale, key, value, rows, columns, dropout)
        return self.proj(output.transpose(1, 2).reshape(batch_size, height, width, -1)), None

    def _position_logits(self, query: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """h (B, heads, H W, H) and w (B, heads, H W, W) of queries (B, heads, H W, c)."""
        grid = query.unflatten(2, (height, width))
        rows = torch.einsum("bnhwc,hkc->bnhwk", grid, self.get_rel_pos(height, height, self.rel_pos_h))
        columns = torch.einsum("bnhwc,wkc->bnhwk", grid, self.get_rel_pos(width, width, self.rel_pos_w))
        return rows.flatten(2, 3), columns.flatten(2, 3)


class LeanSamVisionAttention(LeanAttention, SamVisionAttention):
    """For SAM's eager attention."""

    has_dropout = True


class LeanSamVisionSdpaAttention(LeanSamVisionAttention, SamVisionSdpaAttention):
    """For SAM's sdpa attention."""

    has_dropout = False


class LeanSamHQVisionAttention(LeanAttention, SamHQVisionAttention):
    """For SAM-HQ's eager attention."""

    has_dropout = True


class LeanSamHQVisionSdpaAttention(LeanSamHQVisionAttention, SamHQVisionSdpaAttention):
    """For SAM-HQ's sdpa attention."""

    has_dropout = False


def _prefers_tiles(query: torch.Tensor) -> bool:
    # a compiler would unroll the tiles, and sums over tiles want more precision than bfloat16
    wide = query.dtype in (torch.float32, torch.float64)
    return query.device.type == "cpu" and wide and not torch.compiler.is_compiling()


def _attend_without_mask(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    dropout: float,
) -> torch.Tensor:
    """Attention on c + H + W channels, rounded up; the query is scaled. Returns (B, heads, H W, c)."""
    head_dim, height, width = query.shape[-1], rows.shape[-1], columns.shape[-1]
    padding = -(head_dim + height + width) % ALIGNMENT
    query = torch.cat([query, rows, columns, query.new_zeros(()).expand(*query.shape[:-1], padding)], dim=-1)
    position = F.pad(one_hot_positions(height, width, key), (0, padding))
    key = torch.cat([key, position.expand(*key.shape[:2], -1, -1)], dim=-1)
    value = F.pad(value, (0, query.shape[-1] - head_dim))
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=1.0)[..., :head_dim]


def one_hot_positions(height: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """(H W, H + W): a one in the column of the token's row, and in that of its column."""
    rows = torch.eye(height, dtype=like.dtype, device=like.device).repeat_interleave(width, dim=0)
    columns = torch.eye(width, dtype=like.dtype, device=like.device).repeat(height, 1)
    return torch.cat([rows, columns], dim=1)


M = TypeVar("M", bound=nn.Module)
_LEAN = {
    SamVisionAttention: LeanSamVisionAttention,
    SamVisionSdpaAttention: LeanSamVisionSdpaAttention,
    SamHQVisionAttention: LeanSamHQVisionAttention,
    SamHQVisionSdpaAttention: LeanSamHQVisionSdpaAttention,
}
_PLAIN = {lean: plain for plain, lean in _LEAN.items()}


def lean_attention(model: M, enabled: bool = True) -> M:
    """Let the image encoder of a SAM or SAM-HQ attend without the N x N position bias, exactly; or undo it.

    SAM 2 and SAM 3 have no such bias.

    Parameters, adapters, hooks and state dict stay as they are. Attention weights cannot be recorded meanwhile. Saving is
    as ever; a loaded model is not lean until it is asked for again.

    Args:
        model: A model with SAM's vision encoder in it: `SamModel`, `SamVisionModel`, mSAM, or one of them with adapters.
        enabled: False goes back to transformers' attention.

    Returns:
        `model`, changed in place.

    Raises:
        ValueError: There is no attention of SAM or SAM-HQ in the model.
    """
    replacements = _LEAN if enabled else _PLAIN
    attentions = [
        module for module in model.modules() if isinstance(module, SamVisionAttention | SamHQVisionAttention)
    ]
    if not attentions:
        raise ValueError(f"lean_attention needs a model with SAM's vision encoder, got {type(model).__name__}.")
    for module in attentions:
        # the class alone changes: weights, adapters inside, and hooks belong to the instance
        module.__class__ = replacements.get(type(module), type(module))
    return model
