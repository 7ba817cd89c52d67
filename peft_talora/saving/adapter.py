"""A saved adapter of an mSAM, read once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.mapping_func import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from torch import nn

from ..msam.adapter import check_same_msam
from ..tuner.config import TargetsConfig
from .directory import read_together
from .patterns import check_patterns
from .recipe import check_recipe, check_sizes_against_weights
from .seal import CONFIG_FILE, SEAL, WEIGHTS_FILE, check_sound, has_weights, parse_json
from .settings import check_settings, split_settings
from .tensors import adapter_tensors, check_tensors, known_to_fit, parse_tensors, try_to_load, weightless_twin

# what mSAM needs, beside an adapter whose configuration has no field for it (PEFT's own tuners)
MSAM_FILE = "msam.json"
PICKLE_FILE = "adapter_model.bin"


@dataclass(frozen=True)
class SavedAdapter:
    """What a directory holds, as one save wrote it. It fits itself, and is yet to be compared with a model.

    Args:
        directory: Where it was read from, for messages.
        config: The adapter's configuration.
        recipe: What builds the mSAM from its SAM: tasks, channel_mode, image_size, and the sizes of the base.
        recipe_file: The file that says so, for messages.
        tensors: The weights, by the names that PEFT saves them with.
        settings: What was saved among them, see `saving.settings`.
        is_sound: Whether the weights are as they were saved, as far as is known.
    """

    directory: Path
    config: PeftConfig
    recipe: Mapping[str, Any]
    recipe_file: Path
    tensors: Mapping[str, torch.Tensor]
    settings: Mapping[str, Any] | None = None
    is_sound: bool = True

    @classmethod
    def read(cls, directory: Path, verify: bool = True) -> SavedAdapter:
        """Read the adapter in a directory; nothing is built, and nothing is written.

        Args:
            directory: The directory.
            verify: Refuse weights that are not as they were saved, by their checksum.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: A file is damaged, contradicts another one, or a newer version of this package wrote it; or the
                adapter is not one of an mSAM. The message names the file.
        """
        contents = read_together(directory, [CONFIG_FILE, WEIGHTS_FILE, MSAM_FILE])
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if name not in contents:
                raise FileNotFoundError(_why_missing(directory, name))
        values = {
            name: parse_json(content, directory / name) for name, content in contents.items() if name != WEIGHTS_FILE
        }
        weights = directory / WEIGHTS_FILE
        tensors, settings = split_settings(parse_tensors(contents[WEIGHTS_FILE], weights))
        config = _parse_config(values[CONFIG_FILE], directory / CONFIG_FILE)
        recipe, name = getattr(config, "msam", None), CONFIG_FILE
        if recipe is None and MSAM_FILE in values:
            recipe, name = {key: value for key, value in values[MSAM_FILE].items() if key != SEAL}, MSAM_FILE
        if recipe is None:
            raise ValueError(
                f"'{directory}' is an adapter, but not one of an MSamForMultiTask: neither its {CONFIG_FILE} has a field "
                f"`msam` nor is there a {MSAM_FILE}. Load it with PeftModel.from_pretrained."
            )
        is_sound = not verify or has_weights(values[name], contents[WEIGHTS_FILE])
        adapter = cls(directory, config, recipe, directory / name, tensors, settings, is_sound)
        adapter._check_sizes()
        return adapter

    def _check_sizes(self) -> None:
        """Compare the sizes that the JSON files give with the weights."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        specs = check_recipe(self.recipe, self.recipe_file, getattr(self.config, "tasks", None))
        file = self.recipe_file
        try:
            check_sizes_against_weights(specs, shapes, self.recipe["image_size"])
            file = self.directory / CONFIG_FILE
            if isinstance(self.config, TargetsConfig):
                self.config.check_shapes(shapes)
        except ValueError as error:
            raise ValueError(f"{file} does not fit {self.directory / WEIGHTS_FILE}: {error}") from error

    def check_fits(self, msam: nn.Module) -> None:
        """Refuse an mSAM that this adapter is not one of, or that PEFT could not load it into; it is not touched.

        Args:
            msam: The `MSamForMultiTask`.

        Raises:
            ValueError: It has other tasks, another order of them, another size, or a tensor does not fit. The message names it.
        """
        try:
            check_same_msam(self.recipe, msam.config, self.config.base_model_name_or_path)
        except ValueError as error:
            raise ValueError(f"{self.recipe_file}: {error}") from error
        file, weights = self.directory / CONFIG_FILE, self.directory / WEIGHTS_FILE
        try:
            check_patterns(self.config, [name for name, _ in msam.named_modules()])
            twin = weightless_twin(msam, self.config)
        except Exception as error:  # each of PEFT's tuners has its own
            raise ValueError(
                f"{file} describes no adapter that PEFT can put on an {type(msam).__name__} without weights: {_line(error)}"
            ) from error
        check_tensors(weights, self.tensors, adapter_tensors(twin))
        self._check_settings()
        # last: what is wrong with a tensor says more
        check_sound(self.is_sound, weights)
        try:
            try_to_load(twin, self.tensors)
        except (ValueError, KeyError, RuntimeError, AttributeError) as error:
            raise ValueError(f"{weights} cannot be loaded into the adapter of {file.name}: {_line(error)}") from error

    def _check_settings(self) -> None:
        if isinstance(self.config, TargetsConfig):
            try:
                check_settings(self.settings, self.config.settings(), self.config.settings_on_file)
            except ValueError as error:
                raise ValueError(f"{self.directory / CONFIG_FILE}: {error}") from error

    def load_into(self, msam: nn.Module, adapter_name: str = "default", is_trainable: bool = False) -> PeftModel:
        """Put the adapter into an mSAM that it fits, as `PeftModel.from_pretrained` does.

        Args:
            msam: The `MSamForMultiTask`.
            adapter_name: The adapter's name in it.
            is_trainable: Whether to train it further; it is frozen otherwise, and the model in evaluation mode.
        """
        self.config.inference_mode = not is_trainable
        model_class = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(self.config.task_type, PeftModel)
        model = model_class(msam, self.config, adapter_name)
        with known_to_fit():
            set_peft_model_state_dict(model, dict(self.tensors), adapter_name)
        return model if is_trainable else model.eval()


def _parse_config(values: Mapping[str, Any], file: Path) -> PeftConfig:
    peft_type = values.get("peft_type")
    if not isinstance(peft_type, str) or peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(f"{file} cannot be read: PEFT knows no peft_type {peft_type!r}.")
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type]
    base = values.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise ValueError(f"{file} cannot be read: `base_model_name_or_path` must be a name or a path, got {base!r}.")
    # meant for a running model, PEFT does not read it from files either
    values = {name: value for name, value in values.items() if name != "runtime_config"}
    try:
        return config_class.from_peft_type(**config_class.check_kwargs(**values))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _line(error: Exception) -> str:
    """Its first line; torch's have more, of what happened in C++."""
    return f"{str(error).strip().partition(chr(10))[0]:.500}"


def _why_missing(directory: Path, name: str) -> str:
    pickled = name == WEIGHTS_FILE and (directory / PICKLE_FILE).is_file()
    why = f". Its {PICKLE_FILE} is not read: a pickle can run any code" if pickled else ""
    return f"'{directory}' is no saved adapter: it has no {name}{why}."
