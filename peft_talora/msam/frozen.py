"""Parameters that stay frozen."""

from __future__ import annotations

from typing import Any

from torch import nn


class FrozenParameter(nn.Parameter):
    """A parameter that `requires_grad_` leaves frozen.

    PEFT switches on every parameter of a module in `modules_to_save`, whenever an adapter is added, set or enabled.
    The IoU head of an mSAM decoder gets no loss: were it trainable, DDP would wait for gradients that never come.
    """

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Stay frozen, whatever is asked for."""
        return super().requires_grad_(False)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # that of nn.Parameter makes a plain one
        return FrozenParameter, (self.data, False)


def freeze(module: nn.Module) -> None:
    """Make every parameter of `module` a [`FrozenParameter`]."""
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            setattr(owner, name, FrozenParameter(parameter.data, requires_grad=False))
