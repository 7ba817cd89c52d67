"""The row of U3 of a task that was added to a trained adapter: a parameter of its own, for it alone is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class OwnRows(nn.ParameterDict):
    """Per adapter the last row of U3, (1, v), where it is trained apart from the others.

    An optimiser changes a parameter as a whole: weight decay and momentum move rows of U3 that have no gradient, too. With a
    parameter of its own the new row is all that it sees. A layer's state has the row as the last one of U3 and nowhere else,
    so that files, checkpoints and checks are those of every adapter; see [`write_rows`] and [`read_rows`].
    """

    def _save_to_state_dict(self, *args: Any) -> None:
        """It is in U3."""

    def _load_from_state_dict(self, *args: Any) -> None:
        """It comes with U3."""


def share_state(layer: nn.Module) -> None:
    """Keep U3 and the rows of a layer with `talora_own_row` equal where its state is taken or loaded."""
    layer.register_state_dict_pre_hook(write_rows)
    layer.register_load_state_dict_pre_hook(write_rows)
    layer.register_load_state_dict_post_hook(read_rows)


@torch.no_grad()
def write_rows(layer: nn.Module, *args: Any) -> None:
    """Bring U3 up to date: before a state is taken, and before one is loaded that may not have this adapter."""
    for adapter_name, row in layer.talora_own_row.items():
        layer.talora_U3[adapter_name][-1:].copy_(row)


@torch.no_grad()
def read_rows(layer: nn.Module, *args: Any) -> None:
    """Take the rows from the U3 that was loaded."""
    for adapter_name, row in layer.talora_own_row.items():
        row.copy_(layer.talora_U3[adapter_name][-1:])
