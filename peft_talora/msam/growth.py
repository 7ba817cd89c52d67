"""What a new task brings to an mSAM that has an adapter: its decoder, its no-mask embedding, and what knows of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from .decoder import token_decoder_state
from .loading import check_plain
from .modeling import MSamForMultiTask
from .tasks import TaskSpec, parse_tasks, tasks_to_list


class MSamGrowth:
    """A task for an mSAM with an adapter. Making it checks everything and changes nothing; [`apply`] puts it in place.

    Args:
        model: The PeftModel around the mSAM.
        adapter_name: The adapter.
        name: The new task's name.
        spec: What the task is.

    Raises:
        ValueError: The task is not possible; or the model has not got its SAM's decoder and embedding to start from.
    """

    def __init__(
        self, model: PeftModel, adapter_name: str, name: str, spec: TaskSpec | Mapping[str, Any] | None
    ) -> None:
        if spec is None:
            raise ValueError(
                f"A task of an MSamForMultiTask needs a `spec`, such as TaskSpec('binary'): '{name}' has none."
            )
        self.msam: MSamForMultiTask = model.get_base_model()
        self.adapter_name, self.name = adapter_name, name
        self.specs = parse_tasks({**self.msam.task_specs, name: copy.deepcopy(spec)})
        self.modules = {"no_mask_embeds": self._new_embedding(), "mask_decoders": self._new_decoder()}
        self.config = model.peft_config[adapter_name]

    def apply(self) -> None:
        """Put everything in place; the new decoder and embedding are trainable."""
        names = [f"{part}.{self.name}" for part in self.modules]
        self.config.modules_to_save = [*(self.config.modules_to_save or []), *names]
        if getattr(self.config, "msam", None) is not None:
            self.config.msam = {**self.config.msam, "tasks": tasks_to_list(self.specs)}
        self.msam.config.tasks = tasks_to_list(self.specs)
        self.msam.task_specs[self.name] = self.specs[self.name]
        for part, module in self.modules.items():
            wrapper = ModulesToSaveWrapper(module, self.adapter_name)
            wrapper.set_adapter(self.adapter_name)
            # as PEFT does it, see TaskDecoders
            setattr(getattr(self.msam, part), self.name, wrapper.train(self.msam.training))
        self.msam.mask_decoders.freeze_untrained()

    def _new_embedding(self) -> nn.Embedding:
        """The SAM's no-mask embedding, for each channel."""
        sams: Any = None
        for task, module in self._base_modules("no_mask_embeds"):
            weight = module.weight.detach()
            sams = weight[:1] if sams is None else sams
            self._check_is_sams("no_mask_embeds", task, [(weight, sams.expand_as(weight))])
        rows = 1 if self.msam.config.decodes_tokens else self.specs[self.name].num_channels
        return nn.Embedding.from_pretrained(sams.expand(rows, -1).clone(), freeze=False)

    def _new_decoder(self) -> nn.Module:
        """The SAM's mask decoder."""
        decoder: Any = None
        sams: dict[str, torch.Tensor] = {}
        decodes_tokens = self.msam.config.decodes_tokens
        for task, module in self._base_modules("mask_decoders"):
            state = module.state_dict()
            state = token_decoder_state(state, 1) if decodes_tokens else state
            decoder, sams = (module, state) if decoder is None else (decoder, sams)
            self._check_is_sams("mask_decoders", task, [(value, sams[key]) for key, value in state.items()])
        if not decodes_tokens:
            return copy.deepcopy(decoder)
        channels, weight = self.specs[self.name].num_channels, decoder.mask_tokens.weight
        new = self.msam.family.decoder(self.msam.config, channels)
        new.load_state_dict(token_decoder_state(decoder.state_dict(), channels))
        return new.to(device=weight.device, dtype=weight.dtype)

    def _base_modules(self, part: str) -> Iterator[tuple[str, nn.Module]]:
        """The tasks' decoders or embeddings as the base model has them, without the adapter."""
        for task, module in getattr(self.msam, part).items():
            name = f"'{part}.{task}'"
            module = module.original_module if isinstance(module, ModulesToSaveWrapper) else module
            if any(isinstance(child, BaseTunerLayer | ModulesToSaveWrapper) for child in module.modules()):
                raise ValueError(
                    f"{name} has parts inside that are tuned: the decoder of a new task is trained as a whole, so that it cannot be "
                    "added to this adapter. Train one with all tasks."
                )
            check_plain(module, name, "a new task starts as a copy of it. Load the model without {}.")
            yield task, module

    def _check_is_sams(self, part: str, task: str, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        if not all(value.is_meta or torch.equal(value, sams) for value, sams in pairs):
            raise ValueError(
                f"'{part}.{task}' differs from the others in the base model: a new task starts with what its SAM has, but this "
                "MSamForMultiTask was itself trained. Put the adapter on one that MSamForMultiTask.from_sam(sam, tasks) makes."
            )
