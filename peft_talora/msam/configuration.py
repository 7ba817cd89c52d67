"""Configuration of mSAM."""

from __future__ import annotations

from typing import Any

from transformers import SamConfig

from .families import FAMILIES, Family
from .tasks import TaskSpec, parse_tasks, tasks_to_list

CHANNEL_MODES = ("prompt", "token")
PARTS = ("vision_config", "prompt_encoder_config", "mask_decoder_config")


class MSamConfig(SamConfig):
    r"""Configuration of an [`MSamForMultiTask`]: that of its SAM, and the tasks.

    Args:
        vision_config (`dict` or `SamVisionConfig`, *optional*): The image encoder; of the base's family, as the other two.
        prompt_encoder_config (`dict` or `SamPromptEncoderConfig`, *optional*):
            SAM's prompt encoder. mSAM has none; it is kept so that a task can become a plain `SamModel` again.
        mask_decoder_config (`dict` or `SamMaskDecoderConfig`, *optional*): The mask decoder, the same for every task.
        tasks (`dict` or `list`):
            `{name: TaskSpec or its fields}`, ordered, or the list of `{"name": ..., **fields}` that files hold (JSON
            writers sort keys, and the order of the tasks means something). Stored as the list.
        channel_mode (`str`):
            "prompt": one decoder pass per output channel, as published. "token": one per task, with a mask token and a
            hypernetwork per channel.
        base_model_type (`str`):
            The family of the base: "sam", "sam_hq", "sam2" or "sam3_tracker", the model type of the plain model.
        initializer_range (`float`): Standard deviation of the weights of a model that is made from the configuration alone.
        tie_word_embeddings (`bool`): Of `SamConfig`; an mSAM has no tied weights.
        **kwargs: The fields of every `transformers.PreTrainedConfig`, such as `dtype` and `return_dict`.

    Raises:
        ValueError: A task, the channel mode or the base is not possible.
    """

    model_type = "msam"

    tasks: list[dict[str, Any]] | dict[str, Any] | None = None
    channel_mode: str = "prompt"
    base_model_type: str = "sam"

    def __post_init__(self, **kwargs: Any) -> None:
        self.tasks = tasks_to_list(parse_tasks(self.tasks)) if self.tasks else []
        if self.channel_mode not in CHANNEL_MODES:
            raise ValueError(f"`channel_mode` must be one of {CHANNEL_MODES}, got {self.channel_mode!r}.")
        if self.base_model_type not in FAMILIES:
            raise ValueError(f"`base_model_type` must be one of {list(FAMILIES)}, got {self.base_model_type!r}.")
        if self.base_model_type != SamConfig.model_type:
            # SamConfig would make those of a SAM
            plain = self.family.model_class.config_class(**{name: getattr(self, name) for name in PARTS})
            for name in PARTS:
                setattr(self, name, getattr(plain, name))
        super().__post_init__(**kwargs)
        self.family.check(self)

    def to_diff_dict(self) -> dict[str, Any]:
        """What is saved. The parts are saved whole where their defaults are not those of a SAM's."""
        values = super().to_diff_dict()
        if self.base_model_type != SamConfig.model_type:
            whole = self.to_dict()
            values.update({name: whole[name] for name in PARTS})
        return values

    @property
    def family(self) -> Family:
        """What there is to know of the base's family."""
        return FAMILIES[self.base_model_type]

    @property
    def task_specs(self) -> dict[str, TaskSpec]:
        """The tasks by name, in their order."""
        return parse_tasks(self.tasks or {})

    @property
    def task_names(self) -> list[str]:
        """The names of the tasks, in their order."""
        return list(self.task_specs) if self.tasks else []

    @property
    def decodes_tokens(self) -> bool:
        """Whether a task is decoded in one pass, with a token per channel."""
        return self.channel_mode == "token"

    @property
    def grid_size(self) -> int:
        """Height and width of the image embedding, in tokens."""
        return self.family.grid_size(self.vision_config)

    @property
    def image_size(self) -> int:
        """Side of the square input, in pixels."""
        return self.family.image_size(self.vision_config)
