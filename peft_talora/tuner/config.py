"""What the configurations of both tuners share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft.config import PeftConfig

from ..saving.directory import finish_pending
from ..saving.seal import CONFIG_FILE, WEIGHTS_FILE, check_format, seal
from ..saving.tensors import Shape, read_shapes
from .checks import check_pattern


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
        saved_by (`dict`, *optional*): Of a file alone: format, settings, checksum. Filled when the adapter is saved.
        task_type, inference_mode, base_model_name_or_path, revision, peft_type, peft_version, auto_mapping:
            PEFT's own, see `peft.PeftConfig`; PEFT fills all of them.

    Raises:
        ValueError: The arguments contradict each other.
    """

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names or a regular expression of the modules to adapt; SAM's qkv (or q_proj and v_proj) when None."
        },
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
        default=None, metadata={"help": "Of a file alone: format, settings, checksum; written by save_pretrained."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        settings = self.saved_by.get("settings") if isinstance(self.saved_by, dict) else None
        # no field: it belongs to the file that this configuration was read from
        self.settings_on_file: dict[str, Any] = settings if isinstance(settings, dict) else {}
        self.saved_by = None
        self._normalise_targets()

    def _normalise_targets(self) -> None:
        """PEFT's conventions for `target_modules`, `exclude_modules` and the arguments that need a list of names."""
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
            elif isinstance(getattr(self, name), str):
                check_pattern(name, getattr(self, name))
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(f"`{name}` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and not self.layers_to_transform and self.layers_to_transform != 0:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")

    def settings(self) -> dict[str, Any]:
        """What an adapter's tensors mean beyond their shapes; weights that were saved with others are refused."""
        return {}

    def check_shapes(self, shapes: Mapping[str, Shape]) -> None:
        """Compare the sizes in this configuration with saved tensors, before anything of these sizes is made.

        Args:
            shapes: The shapes of all saved tensors.

        Raises:
            ValueError: The message names both sizes.
        """

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save as PEFT does, with the format and the settings."""
        super().save_pretrained(save_directory, **kwargs)
        seal(Path(save_directory) / CONFIG_FILE, settings=self.settings())

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Read as PEFT does; a configuration in a directory must fit the weights beside it.

        Raises:
            ValueError: The weights are damaged or do not fit, or a newer version saved the adapter. The message names the file.
        """
        directory = Path(pretrained_model_name_or_path, subfolder or "")
        finish_pending(directory)
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if isinstance(config, TargetsConfig) and (directory / WEIGHTS_FILE).is_file():
            config.check_shapes(read_shapes(directory))
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Read what PEFT is about to load, unless a newer version saved it."""
        values = super().from_json_file(path_json_file, **kwargs)
        check_format(values, Path(path_json_file))
        return values
