"""The TA-LoRA layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..msam.frozen import FrozenParameter
from ..routing.checkpointing import in_backward
from ..routing.mixed_batch import by_sample, samples_of
from ..routing.replay import replaying
from ..routing.router import TaskRouter
from ..tuner.low_rank import add_product
from .config import TALoraConfig
from .init import fill_factors
from .merging import MergingLayer
from .own_row import OwnRows, share_state


class TALoraLayer(MergingLayer):
    """The factors of TA-LoRA for one linear layer, and what PEFT does with every tuner layer."""

    # All names of layers that may contain (trainable) adapter weights
    adapter_layer_names: tuple[str, ...] = ("talora_G", "talora_U1", "talora_U2", "talora_U3")
    # All names of other parameters that may contain adapter-related parameters
    other_param_names = (
        "r_in",
        "r_out",
        "r_task",
        "scaling",
        "talora_dropout",
        "enable_qkv",
        "ortho_reg_weight",
        "is_shared",
    )

    def __init__(self, base_layer: nn.Module, task_router: TaskRouter, **kwargs: Any) -> None:
        super().__init__(base_layer, task_router, **kwargs)
        self.r_in: dict[str, int] = {}
        self.r_out: dict[str, int] = {}
        self.r_task: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.enable_qkv: dict[str, list[bool] | None] = {}
        self.ortho_reg_weight: dict[str, float] = {}
        self.is_shared: dict[str, bool] = {}
        self.talora_dropout = nn.ModuleDict({})
        self.talora_own_row = OwnRows()
        share_state(self)

    @property
    def is_task_aware(self) -> bool:
        """Whether the output depends on the task that the forward is for."""
        if self.disable_adapters or self.own_task is not None:
            return False
        return any(name in self.talora_G and not self.is_shared[name] for name in self.active_adapters)

    def update_layer(self, adapter_name: str, config: TALoraConfig, name: str = "") -> None:
        """Add the factors of the adapter `adapter_name`.

        Args:
            adapter_name: The adapter's name.
            config: The adapter's configuration; its `tasks` must be set.
            name: The layer's full name in the model, for error messages.
        """
        num_enabled = config.num_enabled_outputs(self.out_features, name)
        assert config.tasks is not None  # filled by the tuner
        p, q, (rows, v) = config.rank_in, config.rank_out, config.task_sizes(name)
        self.r_in[adapter_name] = p
        self.r_out[adapter_name] = q
        self.r_task[adapter_name] = v
        self.scaling[adapter_name] = config.scaling
        self.enable_qkv[adapter_name] = config.enable_qkv
        self.ortho_reg_weight[adapter_name] = config.ortho_reg_weight
        self.is_shared[adapter_name] = config.shares(name)
        dropout = nn.Dropout(p=config.talora_dropout) if config.talora_dropout > 0.0 else nn.Identity()
        self.talora_dropout.update(nn.ModuleDict({adapter_name: dropout}))
        self.talora_G[adapter_name] = nn.Parameter(torch.zeros(p, q, v))
        self.talora_U1[adapter_name] = nn.Parameter(torch.empty(self.in_features, p))
        self.talora_U2[adapter_name] = nn.Parameter(torch.empty(num_enabled, q))
        self.talora_U3[adapter_name] = nn.Parameter(torch.empty(rows, v))
        if adapter_name in self.talora_own_row:
            del self.talora_own_row[adapter_name]
        self.task_router.add(adapter_name, config.tasks, config.added_tasks)

        self.reset_talora_parameters(adapter_name, config.init_weights)
        self._activate(adapter_name, config)

    def task_rows(self, adapter_name: str) -> torch.Tensor:
        """U3, (T, v), or (1, v) in a shared layer; the row of a task that was added comes from the parameter that it is trained in."""
        U3 = self.talora_U3[adapter_name]
        if adapter_name not in self.talora_own_row:
            return U3
        return torch.cat([U3[:-1], self.talora_own_row[adapter_name]])

    @torch.no_grad()
    def add_task_row(self, adapter_name: str, row: torch.Tensor) -> None:
        """Add a task: a last row of U3 that is a parameter of its own. The other rows are never trained again here.

        Args:
            adapter_name: The adapter's name.
            row: Where the row starts, (v,).
        """
        rows = torch.cat([self.task_rows(adapter_name), row[None]])
        self.talora_U3[adapter_name] = FrozenParameter(rows, requires_grad=False)
        self.talora_own_row[adapter_name] = nn.Parameter(row[None].clone())
        # for PEFT it is a parameter of the adapter like the others, of this layer
        self.adapter_layer_names = (*type(self).adapter_layer_names, "talora_own_row")

    @torch.no_grad()
    def reset_talora_parameters(self, adapter_name: str, init_weights: bool | str) -> None:
        """Fill the factors as `TALoraConfig.init_weights` says."""
        G, U1, U2, U3 = self.parameters_of(adapter_name)
        if G.device.type != "meta":
            fill_factors(G, U1, U2, U3, init_weights)

    auxiliary_reduction = staticmethod(torch.mean)

    def auxiliary_values(self, adapter_name: str) -> torch.Tensor | None:
        """`ortho_reg_weight` times [`ortho_norms`]; None where the weight is zero."""
        weight = self.ortho_reg_weight.get(adapter_name)
        return weight * self.ortho_norms(adapter_name) if weight else None

    def ortho_norms(self, adapter_name: str) -> torch.Tensor:
        """The 2 + v Frobenius norms of MTSAM's orthogonality term: of U1, U2 and every slice of G, each against I."""
        G, U1, U2, _ = (
            factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in self.parameters_of(adapter_name)
        )
        # autocast would round the products, of which little is left once I is taken away
        with torch.autocast(U1.device.type, enabled=False):
            slices = G.permute(2, 0, 1)
            grams = [(U1.T @ U1)[None], (U2.T @ U2)[None], slices.mT @ slices]
            eyes = [torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device) for gram in grams]
            return torch.cat([torch.linalg.matrix_norm(gram - eye) for gram, eye in zip(grams, eyes, strict=True)])

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove the adapter `adapter_name` and its tasks."""
        super().delete_adapter(adapter_name)
        self.task_router.forget(adapter_name)


class TALoraLinear(nn.Module, TALoraLayer):
    r"""A linear layer W0 (k x d) with one low-rank update tensor for T tasks (TA-LoRA, arXiv 2403.10971, section 3.2).

    The update tensor is a Tucker product, dW = G x1 U1 x2 U2 x3 U3, of which task t sees the slice

        dW_t[o, i] = s * sum_{a,b,c} G[a,b,c] U1[i,a] U2[o,b] U3[t,c]
        y = W0 x + bias + dW_t dropout(x)

    with G (p, q, v), U1 (d, p), U2 (k, q) and U3 (T, v); in a layer of `TALoraConfig.shared_layers` v is 1, and the one row of U3
    is every task's. It is never built: with M_t = sum_c U3[t,c] G[:,:,c] (p, q),
    one task costs two products, x (s U1 M_t) and that times U2^T, which is a LoRA of rank min(p, q); a batch of mixed
    tasks multiplies x U1 of each sample with the M_t of its task.

    Args:
        base_layer: The linear layer to adapt (`nn.Linear`, or a quantised one that PEFT knows).
        adapter_name: The adapter's name.
        config: The adapter's configuration.
        task_router: Says which tasks a forward is for; shared by all layers of a model.
        name: The layer's full name, for error messages.

    Shapes:
        x: `(rows, ..., d)`; rows is the batch size B, or a multiple of it where a layer splits every sample into parts
        that follow each other (SAM's windows). Returns `(rows, ..., k)`.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: TALoraConfig,
        task_router: TaskRouter,
        name: str = "",
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        TALoraLayer.__init__(self, base_layer, task_router, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config=config, name=name)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(rows, ..., d) -> (rows, ..., k) for the tasks of this forward, with the active adapters added up; see the class.

        Raises:
            ValueError: `rows` is no multiple of the number of samples that tasks are given for, or another task than the
                forward's is merged.
        """
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if self.merged:
            self.check_merged_tasks()
            return self.base_layer(x, *args, **kwargs)

        result = self.base_result(x, *args, **kwargs)
        if self.task_router.adapter_names is not None:
            return self._add_mixed_adapters(result, x, self.task_router.adapter_names)
        result_dtype = result.dtype
        for adapter_name in self.active_adapters:
            if adapter_name in self.talora_G:
                hidden = self._hidden(adapter_name, x, self.task_of(adapter_name))
                result = add_product(result, hidden, self._padded_U2(adapter_name))
        return result.to(result_dtype)

    def _add_mixed_adapters(
        self, result: torch.Tensor, x: torch.Tensor, adapter_names: tuple[str, ...]
    ) -> torch.Tensor:
        """`result` with the update of each sample's own adapter, (rows, ..., k)."""
        inputs, outputs = by_sample(x, len(adapter_names)), by_sample(result, len(adapter_names))
        for adapter_name in sorted(self.talora_G.keys() & set(adapter_names)):
            samples = samples_of(adapter_name, adapter_names, x.device)
            task = self.task_of(adapter_name)
            if isinstance(task, torch.Tensor):
                task = task.to(x.device)[samples]
            hidden = self._hidden(adapter_name, inputs[samples].flatten(0, 1), task)
            update = F.linear(hidden, self._padded_U2(adapter_name))
            outputs = outputs.index_add(0, samples, by_sample(update, len(samples)).to(outputs.dtype))
        return outputs.reshape(result.shape)

    def _hidden(self, adapter_name: str, x: torch.Tensor, task: int | torch.Tensor) -> torch.Tensor:
        """dW_t x before U2, (rows, ..., q), for the task of the whole batch or the task of each sample."""
        self._check_replay(adapter_name)
        x = self.talora_dropout[adapter_name](self._cast_input_dtype(x, self.talora_U1[adapter_name].dtype))
        if isinstance(task, int):
            return x @ (self.talora_U1[adapter_name] @ self._core(adapter_name, task))
        return self._mixed_hidden(adapter_name, x, task.to(x.device))

    def _core(self, adapter_name: str, task: int | torch.Tensor) -> torch.Tensor:
        """s M_t: (p, q) for one task, and in a shared layer for all of them; (B, p, q) for one task per sample."""
        G = self.talora_G[adapter_name]
        rows = self.task_rows(adapter_name)[0 if self.is_shared[adapter_name] else task] * self.scaling[adapter_name]
        if rows.ndim == 1:
            return G @ rows
        p, q, v = G.shape
        return (rows @ G.reshape(p * q, v).T).reshape(-1, p, q)

    def _mixed_hidden(self, adapter_name: str, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """x U1 (s M_t) with the task t of each sample: (rows, ..., d) -> (rows, ..., q)."""
        rows, batch = x.shape[0], ids.shape[0]
        if batch == 0 and rows == 0:
            return x.new_zeros(*x.shape[:-1], self.r_out[adapter_name])
        if batch == 0 or rows % batch:
            raise ValueError(
                f"task_ids names the tasks of {batch} samples, but a layer sees {rows} rows, which is no multiple of "
                f"it: one id per sample. The known tasks are {list(self.task_router.tasks[adapter_name])}."
            )
        U1 = self.talora_U1[adapter_name]
        p, q = self.r_in[adapter_name], self.r_out[adapter_name]
        # a sample's windows follow each other, so that its rows can be joined instead of repeating its id
        hidden = (x @ U1).reshape(batch, -1, p) @ self._core(adapter_name, ids)
        return hidden.reshape(*x.shape[:-1], q)

    def _padded_U2(self, adapter_name: str) -> torch.Tensor:
        """U2 with zero rows for the thirds of a fused q/k/v projection that are not enabled: (k, q)."""
        U2, enabled = self.talora_U2[adapter_name], self.enable_qkv[adapter_name]
        if enabled is None or all(enabled):
            return U2
        parts = iter(U2.chunk(sum(enabled)))
        zeros = U2.new_zeros(self.out_features // 3, U2.shape[1])
        return torch.cat([next(parts) if on else zeros for on in enabled])

    def _check_replay(self, adapter_name: str) -> None:
        """Refuse a replay by activation checkpointing that does not know the tasks of its forward."""
        if torch.compiler.is_compiling() or not in_backward():
            return
        if self.own_task is not None or self.is_shared[adapter_name] or len(self.task_router.tasks[adapter_name]) == 1:
            return
        if not replaying():
            raise RuntimeError(
                "A checkpointed TA-LoRA layer runs again in backward without the tasks of its forward, which could "
                "give the gradients of another task. Pass `use_reentrant=False, "
                "context_fn=peft_talora.checkpoint_context` to torch.utils.checkpoint.checkpoint."
            )

    def get_delta_weight(self, adapter: str, task: int | None = None) -> torch.Tensor:
        """dW_t (k, d) of an adapter, for the task index `task`, or its active task, or the only task of the layer.

        Args:
            adapter: The adapter's name.
            task: The task's index; the adapter's active task when None.
        """
        if task is None:
            task = self.task_router.active[adapter] if self.own_task is None else self.task_of(adapter)
        U1, U2 = self.talora_U1[adapter], self._padded_U2(adapter)
        core, dtype = self._core(adapter, task), U1.dtype
        # half precision products are slow, or missing, on CPUs
        if U1.device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
            U1, U2, core = U1.float(), U2.float(), core.float()
        return (U2 @ (U1 @ core).T).to(dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT may convert the adapter: one LoRA holds one update. `task_to_lora` converts any task exactly."""
        return self.is_shared.get(adapter_name, False) or len(self.task_router.tasks.get(adapter_name, ())) == 1

    def __repr__(self) -> str:
        return "talora." + super().__repr__()
