"""The TA-LoRA tuner."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from peft.tuners.tuners_utils import onload_layer
from torch import nn

from ..msam.adapter import is_msam, task_of_module
from ..routing.hooks import add_task_hook, remove_task_hook
from ..routing.mixed_batch import check_adapter_names, route_adapters, saved_modules_use
from ..routing.requests import TaskRequest, task_index
from ..routing.router import TaskRouter, find_routers, set_task, use_task
from ..routing.signature import hide_task_ids, show_task_ids
from ..tuner.layer_index import as_indices
from ..tuner.model import PluginTuner
from ..tuner.tensors import device_of
from .config import TALoraConfig
from .layer import TALoraLayer, TALoraLinear
from .shared_layers import any_tells_tasks_apart


class TALoraModel(PluginTuner):
    """TA-LoRA (arXiv 2403.10971): one update tensor per layer, shared by all tasks and specific to each.

    Args:
        model ([`torch.nn.Module`]): The model to be adapted.
        config ([`TALoraConfig`]): The configuration of the TA-LoRA model.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.
        low_cpu_mem_usage (`bool`, *optional*, defaults to `False`): Create empty adapter weights on the meta device.

    Returns:
        `torch.nn.Module`: The TA-LoRA model.

    Example:
        ```py
        >>> from transformers import SamModel
        >>> from peft import get_peft_model
        >>> from peft_talora import TALoraConfig

        >>> sam = SamModel.from_pretrained("facebook/sam-vit-base")
        >>> model = get_peft_model(sam, TALoraConfig(tasks=["depth", "normals"]))
        >>> model.set_task("normals")
        >>> with model.use_task(["depth", "normals"]):  # one task per image
        ...     embeddings = model.vision_encoder(pixel_values).last_hidden_state
        ```

    **Attributes**:
        - **model** ([`~torch.nn.Module`]) -- The model to be adapted.
        - **peft_config** ([`TALoraConfig`]): The configuration of the TA-LoRA model.
        - **task_router** ([`TaskRouter`]): Says which task each sample of a forward belongs to.
    """

    prefix: str = "talora_"
    tuner_layer_cls = TALoraLayer
    linear_layer_cls = TALoraLinear

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        # before the layers are made: they share it, also with those of an earlier injection into the same model
        routers = find_routers(model)
        self.task_router = routers[0] if routers else TaskRouter()
        super().__init__(model, *args, **kwargs)

    def _prepare_model(self, peft_config: TALoraConfig, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        if not peft_config.tasks:
            raise ValueError(
                f"TALoraConfig.tasks is required for a {type(model).__name__}: the ordered names of the tasks, for "
                'instance TALoraConfig(tasks=["depth", "normals"]). Only an MSamForMultiTask brings its own.'
            )
        peft_config.check_active_task()
        shared = as_indices(peft_config.shared_layers)
        if not shared or any_tells_tasks_apart(peft_config, shared, model):
            peft_config.warn_of_shared_starts()

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As in PEFT; then make the configuration's task the active one."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        self.task_router.active[adapter_name] = task_index(config.active_task or 0, config.tasks)

    @classmethod
    def _get_adapter_state_dict(cls, model: Any, config: Any, adapter_name: str, **kwargs: Any) -> dict[str, Any]:
        # PEFT and transformers save the configuration after the weights
        for router in find_routers(model):
            task = router.active.get(adapter_name, 0)
            config.active_task = config.tasks[task] if task else None
        return super()._get_adapter_state_dict(model, config, adapter_name, **kwargs)

    def _layer_kwargs(self) -> dict[str, Any]:
        return {"task_router": self.task_router}

    def _create_new_module(self, peft_config: Any, adapter_name: str, target: nn.Module, name: str) -> TALoraLayer:
        layer = super()._create_new_module(peft_config, adapter_name, target, name)
        layer.own_task = task_of_module(self.model, name)
        return layer

    def _add_hooks(self) -> None:
        super()._add_hooks()
        add_task_hook(self.model, self.task_router)
        show_task_ids(self.model)

    def _remove_hooks(self) -> None:
        super()._remove_hooks()
        remove_task_hook(self.model)
        hide_task_ids(self.model)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As in PEFT; all layers are asked before the first one is changed, with `safe_merge` for their numbers, too."""
        self._tasks_once_merged(adapter_names)
        if safe_merge:
            self._check_merged_weights(adapter_names)
        super().merge_adapter(adapter_names, safe_merge=False)

    def _check_merged_weights(self, adapter_names: list[str] | None) -> None:
        for layer in self.model.modules():
            if isinstance(layer, TALoraLayer):
                with onload_layer(layer):
                    layer.check_merged_weight(adapter_names)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        # before anything is changed: a refusal must not leave half a model
        tasks = self._tasks_once_merged(adapter_names) if merge else []
        if is_msam(self.model) and len(tasks) > 1:
            raise ValueError(f"Only one task can be merged, but the adapters have the tasks {tasks}.")
        if merge and safe_merge:
            self._check_merged_weights(adapter_names)
        model = super()._unload_and_optionally_merge(merge, progressbar, adapter_names=adapter_names)
        if is_msam(model) and tasks:
            # merged weights are those of one task; what belongs to the others would give wrong results with them
            model.keep_tasks(tasks)
        return model

    def _tasks_once_merged(self, adapter_names: list[str] | None) -> list[str]:
        """The names of the tasks whose updates the weights hold once the adapters are merged, too.

        The layers of a task's decoder hold that task's; where no other layer is tuned, the active task counts. A layer whose
        update all tasks share is right for each of them.
        """
        router, tasks, active = self.task_router, set(), set()
        for layer in self.model.modules():
            if isinstance(layer, TALoraLayer):
                for adapter_name, task in {**layer.merged_tasks, **layer.tasks_to_merge(adapter_names)}.items():
                    if layer.is_shared[adapter_name]:
                        continue
                    names = router.tasks[adapter_name]
                    active.add(names[router.active[adapter_name]])
                    if layer.own_task is None:
                        tasks.add(names[task])
        return sorted(tasks or active)

    def set_task(self, task: str | int) -> None:
        """Make `task` (a name or an index) the active one until the next call."""
        set_task(self.model, task)

    def use_task(self, task: TaskRequest) -> AbstractContextManager[None]:
        """Use `task` in a `with` block, in this thread: a name, an index, or one of these per sample."""
        return use_task(self.model, task)

    @property
    def active_task(self) -> str | dict[str, str]:
        """The name of the active task; with several active adapters the name for each of them."""
        router = self.task_router
        names = {a: router.tasks[a][router.active[a]] for a in self.active_adapters if a in router.tasks}
        return next(iter(names.values())) if len(names) == 1 else names

    @contextmanager
    def _enable_peft_forward_hooks(
        self, *args: Any, adapter_names: Sequence[str] | None = None, task_ids: Any = None, **kwargs: Any
    ) -> Iterator[None]:
        if isinstance(task_ids, str | int):
            raise ValueError(f"task_ids takes one task per sample, got {task_ids!r}; use use_task for a single task.")
        # an mSAM routes its own
        if adapter_names is None and (task_ids is None or is_msam(self.model)):
            yield
            return
        device = device_of(self.model)
        with ExitStack() as stack:
            if adapter_names is None:
                routing = self.task_router.resolve(task_ids, device)
            else:
                self._check_mixed_batch(adapter_names)
                routing = route_adapters(self.task_router, adapter_names, task_ids, device)
                stack.enter_context(saved_modules_use(self.model, adapter_names))
            stack.enter_context(self.task_router.using(routing))
            yield

    def _check_mixed_batch(self, adapter_names: Sequence[str]) -> None:
        """Refuse `adapter_names` where PEFT's LoRA does, and where PEFT cannot mix what was trained in full."""
        if is_msam(self.model):
            raise ValueError(
                "Mixed adapter batches (`adapter_names`) are not supported for an mSAM: its mask decoders and LayerNorms "
                "are trained in full, and PEFT mixes no such modules. Call it once per adapter; `task_ids` mixes the tasks "
                "of one."
            )
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        check_adapter_names(adapter_names, self.task_router.tasks)
        if any(isinstance(layer, TALoraLayer) and layer.merged for layer in self.model.modules()):
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward, which also takes `task_ids` and `adapter_names`, one for each sample."""
        with self._enable_peft_forward_hooks(*args, **kwargs):
            kwargs.pop("adapter_names", None)
            return self.model(*args, **kwargs)
