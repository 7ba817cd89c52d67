"""The update of one task as a part of the base layer's weight, and out of it again."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from ..routing.router import TaskRouter
from ..tuner.layer import PluginLayer


class MergingLayer(PluginLayer):
    """A layer whose base weight can hold the update of one task of each adapter, the one that is active then.

    Args:
        base_layer: The layer to adapt.
        task_router: Says which tasks a forward is for.
        kwargs: What PEFT's quantisation backends ask for.
    """

    talora_G: nn.ParameterDict
    # per adapter: whether the update is the same for all tasks
    is_shared: dict[str, bool]

    def __init__(self, base_layer: nn.Module, task_router: TaskRouter, **kwargs: Any) -> None:
        super().__init__(base_layer, **kwargs)
        self.task_router = task_router
        # the one task that the layer belongs to, whatever the forward is for; None outside of the decoders of an mSAM
        self.own_task: str | None = None
        # the task that each merged adapter was merged for
        self.merged_tasks: dict[str, int] = {}

    def task_of(self, adapter_name: str) -> int | torch.Tensor:
        """The index of the task that the layer computes now, or of each sample's task, a LongTensor (B,).

        It is 0, whatever the forward is for, where all tasks share the update.
        """
        if self.is_shared[adapter_name]:
            return 0
        if self.own_task is None:
            return self.task_router.task_of(adapter_name)
        return self.task_router.tasks[adapter_name].index(self.own_task)

    def get_delta_weight(self, adapter: str, task: int | None = None) -> torch.Tensor:
        """The update of a task, the active one when None, in the form of the base layer's weight."""
        raise NotImplementedError

    def check_merged_tasks(self) -> None:
        """Refuse a forward for another task than the one in the merged weights.

        Raises:
            ValueError: The message names both.
        """
        for adapter_name in self.merged_adapters:
            tasks = self.task_router.tasks[adapter_name]
            merged, requested = self.merged_tasks[adapter_name], self.task_of(adapter_name)
            if isinstance(requested, torch.Tensor):
                if torch.compiler.is_compiling():
                    message = f"The adapter '{adapter_name}' is merged for the task '{tasks[merged]}', and task_ids ask for others."
                    torch._assert_async((requested == merged).all(), message)
                    continue
                other = [tasks[i] for i in requested.unique().tolist() if i != merged]
            else:
                other = [tasks[requested]] if requested != merged else []
            if other:
                raise ValueError(
                    f"The adapter '{adapter_name}' is merged for the task '{tasks[merged]}', but the forward is for "
                    f"{other}. Call unmerge_adapter() first, or use the task '{tasks[merged]}'."
                )

    def tasks_to_merge(self, adapter_names: list[str] | None = None) -> dict[str, int]:
        """The task of each of the adapters (all active ones when None) that [`merge`] would merge.

        Raises:
            ValueError: There is one task per sample, or the adapter is merged for another task already.
        """
        tasks: dict[str, int] = {}
        for adapter_name in self.active_adapters if adapter_names is None else adapter_names:
            if adapter_name not in self.talora_G:
                continue
            task = self.task_of(adapter_name)
            if isinstance(task, torch.Tensor):
                raise ValueError("Only one task can be merged: leave use_task(...) with one task per sample first.")
            merged = self.merged_tasks.get(adapter_name, task)
            if merged != task:
                names = self.task_router.tasks[adapter_name]
                raise ValueError(
                    f"The adapter '{adapter_name}' is merged for the task '{names[merged]}' already. Call "
                    f"unmerge_adapter() before it is merged for '{names[task]}'."
                )
            tasks[adapter_name] = task
        return tasks

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge the active task's update of the active adapters into the base weight.

        Args:
            safe_merge: Check the merged weight for NaN and infinity before it replaces the base weight.
            adapter_names: The adapters to merge; all active ones when None.
        """
        if safe_merge:
            self.check_merged_weight(adapter_names)
        tasks = self.tasks_to_merge(adapter_names)
        for adapter_name in check_adapters_to_merge(self, adapter_names):
            if adapter_name not in tasks:
                continue
            task = tasks[adapter_name]
            base_weight = self.get_base_weight()
            self.set_base_weight(base_weight + self.get_delta_weight(adapter_name, task).to(base_weight.dtype))
            self.merged_adapters.append(adapter_name)
            self.merged_tasks[adapter_name] = task

    def check_merged_weight(self, adapter_names: list[str] | None = None) -> None:
        """Refuse to merge the adapters (all active ones when None) where NaN or infinity would come of it; nothing changes.

        Raises:
            ValueError: The message names the adapter.
        """
        merged = self.get_base_weight()
        for adapter_name, task in self.tasks_to_merge(adapter_names).items():
            if adapter_name not in self.merged_adapters:
                merged = merged + self.get_delta_weight(adapter_name, task).to(merged.dtype)
                if not torch.isfinite(merged).all():
                    raise ValueError(
                        f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken"
                    )

    def unmerge(self) -> None:
        """Take all merged updates out of the base weight."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            adapter_name = self.merged_adapters.pop()
            task = self.merged_tasks.pop(adapter_name)
            if adapter_name in self.talora_G:
                base_weight = self.get_base_weight()
                delta = self.get_delta_weight(adapter_name, task).to(base_weight.dtype)
                self.set_base_weight(base_weight - delta)
