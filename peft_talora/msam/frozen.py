"""The parts of mask decoders that no loss reaches: they stay as the SAM has them, frozen, and no adapter holds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn

from .decoder import untrained_parts


class FrozenParameter(nn.Parameter):
    """A parameter that `requires_grad_` leaves frozen.

    PEFT switches on every parameter of a module in `modules_to_save`, whenever an adapter is added, set or enabled.
    Were one trainable that gets no loss, DDP would wait for gradients that never come.
    """

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Stay frozen, whatever is asked for."""
        return super().requires_grad_(False)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # that of nn.Parameter makes a plain one
        return FrozenParameter, (self.data, False)


def frozen(parameter: nn.Parameter) -> nn.Parameter:
    """A [`FrozenParameter`] with its data, or itself, frozen, where it has a type of its own (a shard)."""
    if type(parameter) is nn.Parameter and type(parameter.data) is torch.Tensor:
        return FrozenParameter(parameter.data, requires_grad=False)
    parameter.requires_grad_(False)
    return parameter


def freeze(module: nn.Module) -> None:
    """Make every parameter of `module` a frozen one."""
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            setattr(owner, name, frozen(parameter))


def keep_frozen(module: nn.Module) -> None:
    """Let what is a [`FrozenParameter`] in `module` stay one where load_state_dict(assign=True) puts others in their places."""
    if _note_frozen not in [hook.hook for hook in module._load_state_dict_pre_hooks.values()]:
        module.register_load_state_dict_pre_hook(_note_frozen)
        module.register_load_state_dict_post_hook(_restore_frozen)


def _note_frozen(module: nn.Module, *args: Any) -> None:
    module._frozen_names = [name for name, p in module.named_parameters() if isinstance(p, FrozenParameter)]


def _restore_frozen(module: nn.Module, incompatible_keys: Any) -> None:
    for name in module.__dict__.pop("_frozen_names", []):
        owner, _, own_name = name.rpartition(".")
        owner = module.get_submodule(owner)
        setattr(owner, own_name, frozen(getattr(owner, own_name)))


class SavedDecoder(ModulesToSaveWrapper):
    """PEFT's wrapper of a mask decoder that is trained in full; the files of adapters hold what of it is trained.

    The rest are copies of the base model's, which a loaded adapter has anyway.
    """

    def adapter_state_dict(self, adapter_name: str, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What is saved, by its name in the decoder."""
        return self._trained(super().adapter_state_dict(adapter_name, state_dict))

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """What has to be in a file, and the names that it gets here."""
        return self._trained(super().adapter_state_dict_load_map(adapter_name))

    def _trained(self, named: Mapping[str, Any]) -> dict[str, Any]:
        untrained = tuple(f"{part}." for part in untrained_parts(self.original_module))
        return {name: value for name, value in named.items() if not name.startswith(untrained)}


class TaskDecoders(nn.ModuleDict):
    """The mask decoder of each task. What no loss reaches stays frozen, however it is loaded, moved, copied or wrapped."""

    def __init__(self, decoders: Mapping[str, nn.Module]) -> None:
        super().__init__(decoders)
        self.register_load_state_dict_post_hook(_freeze_loaded)
        self.freeze_untrained()

    def freeze_untrained(self) -> None:
        """Freeze it again, where something has put other parameters in its place."""
        for decoder in self._decoders():
            for part in untrained_parts(decoder):
                freeze(decoder.get_submodule(part))

    def _decoders(self) -> Iterator[nn.Module]:
        for decoder in self.values():
            if isinstance(decoder, ModulesToSaveWrapper):
                yield from (decoder.original_module, *decoder.modules_to_save.values())
            else:
                yield decoder

    def __setattr__(self, name: str, value: Any) -> None:
        if type(value) is ModulesToSaveWrapper:
            # PEFT has no say in which wrapper it uses; this one has the same state
            value.__class__ = SavedDecoder
        super().__setattr__(name, value)

    def _apply(self, *args: Any, **kwargs: Any) -> TaskDecoders:
        super()._apply(*args, **kwargs)
        self.freeze_untrained()
        return self


def _freeze_loaded(decoders: TaskDecoders, incompatible_keys: Any) -> None:
    """After load_state_dict(assign=True)."""
    decoders.freeze_untrained()
