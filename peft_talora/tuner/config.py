"""What the configurations of both tuners share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft.config import PeftConfig
from peft.utils import CONFIG_NAME

from ..saving.directory import finish_pending
from ..saving.seal import check_seal, seal


def check_positive_int(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")


def check_probability(name: str, value: Any) -> None:
    """Raise ValueError unless 0 <= `value` < 1."""
    if not 0.0 <= value < 1.0:
        raise ValueError(f"`{name}` must be in [0, 1), got {value!r}.")


@dataclass
class TargetsConfig(PeftConfig):
    """Which modules an adapter changes or saves in full; each tuner's docstring says what None means.

    Args:
        target_modules: Names or a regular expression of the modules to adapt.
        exclude_modules: Names or a regular expression of the modules to leave alone.
        layers_to_transform: Adapt only the layers with these indices; target_modules must be names then.
        layers_pattern: The name of the layers' list, used only with layers_to_transform.
        modules_to_save: Further modules that are trained in full and saved.
        msam: What an `MSamForMultiTask` needs to be built again from its SAM.
        saved_by (`dict`, *optional*): Of a file alone: format and checksums. Filled when the adapter is saved.
        task_type, inference_mode, base_model_name_or_path, revision, peft_type, peft_version, auto_mapping:
            PEFT's own, see `peft.PeftConfig`; PEFT fills all of them.

    Raises:
        ValueError: The arguments contradict each other.
    """

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names or a regular expression of the modules to adapt; the fused qkv of SAM when None."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names or a regular expression of the modules to leave alone."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None,
        metadata={"help": "Adapt only the layers with these indices; target_modules must be a list then."},
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "The name of the layers' list, used only with layers_to_transform."}
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Further modules that are trained in full and saved; for mSAM filled when None."},
    )
    msam: dict[str, Any] | None = field(
        default=None, metadata={"help": "What an MSamForMultiTask needs to be rebuilt; filled by get_peft_model."}
    )

    saved_by: dict[str, Any] | None = field(
        default=None, metadata={"help": "Of a file alone: format and checksums, written by save_pretrained."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.saved_by = None
        self._normalise_targets()

    def _normalise_targets(self) -> None:
        """PEFT's conventions for `target_modules`, `exclude_modules` and the arguments that need a list of names."""
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(f"`{name}` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and not self.layers_to_transform and self.layers_to_transform != 0:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save as PEFT does, with the format and a checksum."""
        super().save_pretrained(save_directory, **kwargs)
        seal(Path(save_directory) / CONFIG_NAME)

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Read what PEFT is about to load, after the check that it is as it was saved.

        Raises:
            ValueError: The file, or the weights beside it, was damaged or changed, or a newer version saved it.
        """
        path = Path(path_json_file)
        finish_pending(path.parent)
        check_seal(path)
        return super().from_json_file(path_json_file, **kwargs)
