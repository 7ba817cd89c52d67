"""Configuration of TA-LoRA."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..registration import add_peft_type
from ..routing.names import validate_task_names
from ..saving.settings import PEFT_PREFIX
from ..saving.tensors import Shape, check_sizes
from ..tuner.checks import check_number, check_positive_int, check_probability, is_int
from ..tuner.config import TargetsConfig
from ..tuner.layer_index import as_indices, layer_index
from .init import COMMON_SHARE
from .shared_layers import checked_indices

# the names of projections that are no fused one
SEPARATE_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
# and those of fused ones
FUSED_NAME = re.compile("qkv|query_key_value|in_proj|c_attn", re.IGNORECASE)
INIT_WEIGHTS = (True, False, *COMMON_SHARE, "orthogonal", "normalized")


@dataclass
class TALoraConfig(TargetsConfig):
    """Configuration of a [`TALoraModel`]: one Tucker-factorised update tensor per layer for all tasks.

    The method is described in https://huggingface.co/papers/2403.10971 (section 3.2).

    Args:
        tasks (`list[str]`, *optional*):
            The ordered task names: unique Python identifiers. Row t of U3 belongs to task t (outside of `shared_layers`). Taken from the model when
            it is an `MSamForMultiTask` and this is None; required for every other model.
        r (`int`): The rank of the input and the output factor, where `r_in` and `r_out` do not say otherwise.
        r_in (`int`, *optional*): The rank p of the input factor U1.
        r_out (`int`, *optional*): The rank q of the output factor U2.
        r_task (`int`):
            The rank v of the task factor U3: the number of G's slices. A start that gives each task a slice needs as many as
            tasks with `init_weights="split"`, and one more with "half" and "lora". Further ones belong to all tasks.
        scaling (`float`): The constant s that the update is multiplied with (not alpha / r).
        talora_dropout (`float`): Dropout probability of the adapter's input.
        enable_qkv (`list[bool]`, *optional*):
            Three booleans for a fused q/k/v projection: which thirds of its output are updated. None updates the
            whole output, of any layer.
        init_weights (`bool` or `str`):
            "split" starts as a LoRA of its own for every task: the ranks are dealt out to the tasks in turn, so that at
            first no task's gradient disturbs another's, and what tasks have in common is learnt from there. "lora"
            starts as one LoRA that all tasks share, M_t = I, with a slice of G for each task that is zero at first, so that
            what is a task's own is learnt from there. "half" has half of the ranks for all tasks, or
            fewer, down to one, so that each task is dealt one of the others, which takes an r above their number. In all three U1 is drawn as LoRA's A, and U2 is zero in the
            place of LoRA's B, so that LoRA's learning rates fit. In the other starts G is zero: `True` is the published
            one (U1, U2, U3 ~ N(0, 1)), which needs learning rates some hundred times smaller; "orthogonal" has U1 and
            U2 with orthonormal columns; "normalized" scales U1, U2 and U3 so that the same optimiser step moves the
            weight as much as in LoRA of the same rank and scaling. `False` leaves nothing zero (for tests).
        ortho_reg_weight (`float`):
            Weight of the orthogonality regulariser (MTSAM), see [`auxiliary_loss`]. 0 switches it off. It asks every slice of G to
            be orthogonal, those too that the starts as LoRAs leave at zero.
        shared_layers (`list[int]` or `int`, *optional*):
            The indices of layers whose update is the same for all tasks: one LoRA (of rank min(p, q)) in the place of the tensor, with
            r_task 1 and one row of U3. An mSAM runs what comes before the first layer that tells tasks apart once for
            all tasks of an image, so that with the first half of the layers here three tasks cost two encoder passes instead of three. Indices are those of
            `layers_to_transform`, and like these they mean a decoder's layers, too, where such are adapted.
        active_task (`str`, *optional*):
            The task that is active when the adapter is made or loaded; the first one when None. An adapter is saved with
            the task that is active then.
        added_tasks (`int`):
            How many of the tasks, the last ones, came later by [`add_task`], which fills it. An mSAM encodes each of them in a
            batch of its own: the others then keep the products they had, to the last bit.
        target_modules (`list[str]` or `str`, *optional*):
            Names of the modules to adapt, or a regular expression. When None, for the models of the SAM family: the fused
            `qkv` of the vision encoder, and for SAM 3 the `q_proj` and `v_proj` of the vision encoder alone.
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

    tasks: list[str] | None = field(
        default=None,
        metadata={
            "help": (
                "The ordered task names, unique Python identifiers. Taken from the model when it is an "
                "MSamForMultiTask, required for every other model."
            )
        },
    )
    r: int = field(default=32, metadata={"help": "The rank of U1 and U2 unless r_in or r_out is given."})
    r_in: int | None = field(default=None, metadata={"help": "The rank p of the input factor U1; r when None."})
    r_out: int | None = field(default=None, metadata={"help": "The rank q of the output factor U2; r when None."})
    r_task: int = field(default=4, metadata={"help": "The rank v of the task factor U3."})
    scaling: float = field(default=0.5, metadata={"help": "The constant s that the update is multiplied with."})
    talora_dropout: float = field(default=0.0, metadata={"help": "Dropout probability of the adapter's input."})
    enable_qkv: list[bool] | None = field(
        default=None,
        metadata={"help": "For a fused q/k/v projection: three booleans, which thirds of the output are updated."},
    )
    init_weights: bool | str = field(
        default="split",
        metadata={
            "help": (
                "'split': as a LoRA for each task, of its share of the ranks. 'lora': as one LoRA shared by all tasks. 'half': "
                "half of the ranks shared, or fewer, so that each task is dealt one of the others. "
                "True: the published start. 'orthogonal': U1 and U2 with orthonormal columns. 'normalized': factors "
                "scaled so that a step moves the weight as much as in LoRA. False: nothing zero, for tests."
            )
        },
    )
    ortho_reg_weight: float = field(
        default=0.0, metadata={"help": "Weight of the orthogonality regulariser; 0 switches it off."}
    )
    active_task: str | None = field(
        default=None,
        metadata={"help": "The task that is active when the adapter is made or loaded; the first when None."},
    )
    added_tasks: int = field(
        default=0, metadata={"help": "How many of the last tasks came later; filled by add_task."}
    )
    shared_layers: list[int] | int | None = field(
        default=None,
        metadata={
            "help": (
                "The indices of layers whose update is the same for all tasks. Where they come first an mSAM runs them once "
                "for all tasks of an image."
            )
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("TALORA")
        if self.tasks is not None:
            self.tasks = list(validate_task_names(self.tasks))
            self.check_active_task()
        self._check_added_tasks()
        for name in ("r", "r_task"):
            check_positive_int(name, getattr(self, name))
        for name in ("r_in", "r_out"):
            if getattr(self, name) is not None:
                check_positive_int(name, getattr(self, name))
        check_probability("talora_dropout", self.talora_dropout)
        for name in ("scaling", "ortho_reg_weight"):
            check_number(name, getattr(self, name))
        if self.ortho_reg_weight < 0:
            raise ValueError(f"`ortho_reg_weight` must not be negative, got {self.ortho_reg_weight}.")
        if not isinstance(self.init_weights, bool | str) or self.init_weights not in INIT_WEIGHTS:
            raise ValueError(f"`init_weights` must be one of {INIT_WEIGHTS}, got {self.init_weights!r}.")
        self._check_enable_qkv()
        self.shared_layers = checked_indices(self.shared_layers, self.layers_to_transform)

    def check_active_task(self) -> None:
        """Raise ValueError unless `active_task` is one of `tasks`."""
        if self.active_task is not None and self.active_task not in (self.tasks or []):
            raise ValueError(f"`active_task` must be one of the tasks {self.tasks}, got {self.active_task!r}.")

    def shares(self, name: str) -> bool:
        """Whether all tasks share the update of a layer, by its name in a model or in a file."""
        if self.shared_layers is None:
            return False
        return layer_index(name.removeprefix(PEFT_PREFIX), self.layers_pattern) in as_indices(self.shared_layers)

    def task_sizes(self, name: str) -> tuple[int, int]:
        """The shape of U3 in the layer `name`: how many rows, and v."""
        return (1, 1) if self.shares(name) else (len(self.tasks or []), self.r_task)

    def _check_added_tasks(self) -> None:
        if not is_int(self.added_tasks, 0) or self.added_tasks >= len(self.tasks or [None]):
            raise ValueError(
                f"`added_tasks` must be how many of the tasks {self.tasks} were added to the first ones, got "
                f"{self.added_tasks!r}."
            )

    def warn_of_shared_starts(self) -> None:
        """Warn where tasks that were to start with a slice of G and ranks of their own share these, or have none."""
        tasks = self.tasks or []
        if self.settings_on_file or len(tasks) < 2:
            return
        for problem in self._shared_starts(tasks):
            warnings.warn(f"With init_weights={self.init_weights!r} {problem} in TALoraConfig.", stacklevel=2)

    def _shared_starts(self, tasks: list[str]) -> Iterator[str]:
        """What tasks share that each was to have, and what cures it."""
        ranks, number = min(self.rank_in, self.rank_out), len(tasks)
        shares = min(self.r_task, ranks)
        if self.init_weights == "split" and shares < number:
            yield (
                f"the {number} tasks share {shares} LoRAs at the start, so that '{tasks[0]}' and '{tasks[shares]}' start alike: "
                f"set r_task (now {self.r_task}) and r to at least {number}"
            )
        one_each = []
        if self.init_weights in ("half", "lora"):
            one_each.append(("slice of G", self.r_task, f"r_task (now {self.r_task})"))
        if self.init_weights == "half":
            one_each.append(("rank", ranks, f"r, or r_in and r_out (now {self.rank_in} and {self.rank_out}),"))
        for what, have, cure in one_each:
            if have <= number:
                yield (
                    f"one {what} is for all of the {number} tasks and each is to have one of its own, but for these {have - 1} are left: "
                    f"set {cure} to at least {number + 1}"
                )

    def num_enabled_outputs(self, out_features: int, name: str) -> int:
        """How many outputs of the layer `name` are updated: all of its `out_features`, or the thirds of `enable_qkv`.

        Raises:
            ValueError: There is a choice of thirds, and the layer is no fused q/k/v projection.
        """
        if self.enable_qkv is None:
            return out_features
        if name.rpartition(".")[2] in SEPARATE_PROJECTIONS:
            raise ValueError(
                f"`enable_qkv` is for a fused q/k/v projection, but the layer '{name}' is one of separate ones: choose "
                "among them with target_modules."
            )
        if out_features % 3:
            raise ValueError(
                f"`enable_qkv` is for a fused q/k/v projection of three equal parts, but the layer '{name}' has "
                f"{out_features} output features, which is not divisible by 3."
            )
        if not FUSED_NAME.search(name.rpartition(".")[2]):
            warnings.warn(
                f"`enable_qkv` takes the layer '{name}' for a fused q/k/v projection and leaves a part of its {out_features} "
                "outputs without an update. If it is none, leave it out of target_modules in TALoraConfig.",
                stacklevel=2,
            )
        return sum(self.enable_qkv) * (out_features // 3)

    def _check_enable_qkv(self) -> None:
        if self.enable_qkv is None:
            return
        flags = list(self.enable_qkv) if isinstance(self.enable_qkv, list | tuple) else []
        if len(flags) != 3 or not all(isinstance(flag, bool) for flag in flags):
            raise ValueError(f"`enable_qkv` must be three booleans (q, k, v) or None, got {self.enable_qkv!r}.")
        if not any(flags):
            raise ValueError("`enable_qkv` must enable at least one of q, k and v, got three times False.")
        self.enable_qkv = flags

    def settings(self) -> dict[str, Any]:
        """See [`TargetsConfig`]."""
        enabled = None if self.enable_qkv is None or all(self.enable_qkv) else self.enable_qkv
        return {
            "tasks": self.tasks,
            "enable_qkv": enabled,
            "scaling": self.scaling,
            "shared_layers": checked_indices(self.shared_layers, None),
        }

    def check_shapes(self, shapes: Mapping[str, Shape]) -> None:
        """See [`TargetsConfig`]."""
        shared = {name: shape for name, shape in shapes.items() if self.shares(name)}
        own = {name: shape for name, shape in shapes.items() if name not in shared}
        shares_any, owns_any = (any(name.endswith(".talora_G") for name in group) for group in (shared, own))
        if shares_any:
            self._check_sizes("one slice and one row in shared_layers", (1, 1), shared)
        if owns_any or not shares_any:
            self._check_sizes("the number of tasks and r_task", (len(self.tasks or []), self.r_task), own)

    def _check_sizes(self, what: str, task_sizes: tuple[int, int], shapes: Mapping[str, Shape]) -> None:
        """Compare the sizes of some layers' G and U3 with this configuration; see [`check_sizes`]."""
        rows, v = task_sizes
        check_sizes(f"r_in, r_out and {what}", (self.rank_in, self.rank_out, v), shapes, "talora_G")
        if self.tasks is not None:
            check_sizes(what, (rows, v), shapes, "talora_U3")

    @property
    def rank_in(self) -> int:
        """The rank p of U1."""
        return self.r if self.r_in is None else self.r_in

    @property
    def rank_out(self) -> int:
        """The rank q of U2."""
        return self.r if self.r_out is None else self.r_out
