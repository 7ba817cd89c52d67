"""mSAM: a SAM without prompts that predicts several dense maps."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.models.sam.modeling_sam import SamPreTrainedModel

from ..auxiliary import auxiliary_loss
from ..routing.requests import TaskRequest
from ..routing.router import check_task_order
from ..saving.loading import load_saved
from .checks import check_all_labels, check_inputs, checked_image_size, checked_task_ids, wanted_tasks
from .configuration import MSamConfig
from .decoder import decode, token_decoder_state
from .encoder import embeddings_by_task, encode_tasks, given_embeddings
from .families import FAMILIES, Family, family_of_model
from .frozen import TaskDecoders
from .loading import check_plain, load_sam
from .loss import task_losses
from .output import MSamOutput
from .processing import post_process
from .split import Features, States
from .tasks import Tasks, TaskSpec, parse_tasks, tasks_to_list

LOAD_INSTEAD = (
    "make the mSAM from the SAM as it is, save it with save_pretrained(directory), and load that with "
    "MSamForMultiTask.from_pretrained(directory, {}=...)."
)


class MSamForMultiTask(SamPreTrainedModel):
    r"""SAM for several dense prediction tasks (mSAM, arXiv 2403.10971, section 3.1).

    The prompt encoder is gone. Task t with N_t output channels has a no-mask embedding E_t (N_t, C), one learnt vector
    per channel, and a copy of SAM's mask decoder. For channel c the decoder gets the image embedding (C, h, w) of its
    task plus E_t[c] spread over h x w, no sparse prompts, and SAM's dense positional encoding; its mask token 0 gives
    the channel's logits (4h, 4w).

    With `channel_mode="token"` (not in the paper) E_t is one vector, and the decoder has a mask token and a
    hypernetwork per channel: one decoder pass for a task instead of N_t. The logits are others from the start on.

    Modules: `vision_encoder`, `shared_image_embedding`, `no_mask_embeds[task]` (`nn.Embedding(N_t, C)`, one row in token
    mode) and `mask_decoders[task]` (a `SamMaskDecoder`; what gets no loss is frozen: the IoU head, and in prompt mode the
    hypernetworks of mask tokens 1 to 3).

    Example:
        ```py
        >>> from peft import get_peft_model
        >>> from peft_talora import MSamForMultiTask, TALoraConfig, TaskSpec

        >>> tasks = {"semantic": TaskSpec("semantic", num_channels=13), "depth": TaskSpec("depth")}
        >>> msam = MSamForMultiTask.from_sam("facebook/sam-vit-base", tasks, image_size=512)
        >>> model = get_peft_model(msam, TALoraConfig())
        >>> output = model(pixel_values, labels={"semantic": classes, "depth": metres})
        >>> output.loss.backward()
        ```
    """

    config_class = MSamConfig
    config: MSamConfig
    base_model_prefix = "msam"
    main_input_name = "pixel_values"
    # SamModel's tied weight belongs to its prompt encoder
    _tied_weights_keys: dict[str, str] = {}

    def __init__(self, config: MSamConfig) -> None:
        super().__init__(config)
        if not config.tasks:
            raise ValueError(
                "An MSamForMultiTask needs at least one task in its config, got none. Make one from a SAM with "
                "MSamForMultiTask.from_sam(sam, tasks), and load an adapter with MSamForMultiTask.from_adapter(...)."
            )
        self.task_specs: dict[str, TaskSpec] = config.task_specs
        self.shared_image_embedding = self.family.position_embedding(config)
        self.vision_encoder = self.family.encoder_class(config.vision_config)
        # the decoder is no PreTrainedModel and would not learn of it otherwise
        config.mask_decoder_config._attn_implementation = config._attn_implementation
        hidden_size = config.mask_decoder_config.hidden_size
        self.no_mask_embeds = nn.ModuleDict(
            {
                name: nn.Embedding(1 if config.decodes_tokens else spec.num_channels, hidden_size)
                for name, spec in self.task_specs.items()
            }
        )
        self.mask_decoders = TaskDecoders(
            {name: self.family.decoder(config, spec.num_channels) for name, spec in self.task_specs.items()}
        )
        self.family.add_parts(self)
        self.post_init()

    @property
    def family(self) -> Family:
        """What there is to know of the base's family; `config.base_model_type` names it."""
        return self.config.family

    def get_input_embeddings(self) -> nn.Module:
        """The patch embedding of the image encoder, as transformers asks for it."""
        return self.vision_encoder.get_input_embeddings()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load what `save_pretrained` wrote, with the arguments of `transformers.PreTrainedModel.from_pretrained`.

        A SAM is loaded by [`MSamForMultiTask.from_sam`], an adapter by [`MSamForMultiTask.from_adapter`].
        """
        loaded = super().from_pretrained(*args, **kwargs)
        # loading replaces the parameters
        (loaded[0] if isinstance(loaded, tuple) else loaded).mask_decoders.freeze_untrained()
        return loaded

    @classmethod
    def from_sam(
        cls,
        sam: PreTrainedModel | str | Path,
        tasks: Tasks,
        image_size: int | None = None,
        channel_mode: str = "prompt",
    ) -> MSamForMultiTask:
        """Make an mSAM from a SAM: every task starts with a copy of its decoder and its no-mask embedding.

        Args:
            sam: A `SamModel`, `SamHQModel`, `Sam2Model` or `Sam3TrackerModel`, or the name or path of a checkpoint of one.
                It is not changed.
            tasks: `{name: TaskSpec or its fields}`, ordered.
            image_size: Side of the input images in pixels, a multiple of the patch size (SAM 2: of 32, with the published
                sizes); position embeddings are interpolated. That of `sam` when None.
            channel_mode: "prompt", one decoder pass per channel as published, or "token", one per task.

        Raises:
            TypeError: `sam` is something else.
            FileNotFoundError: There is no checkpoint of that name.
            ValueError: A task, or the image size, is not possible; or `sam` has an adapter, or is quantised, sharded or
                offloaded.
        """
        if isinstance(sam, str | Path):
            sam = load_sam(sam)
        family = family_of_model(sam)
        if family is None:
            known = " or a ".join(family.model_class.__name__ for family in FAMILIES.values())
            raise TypeError(f"`sam` must be a {known}, or the name or path of one, got {type(sam).__name__}.")
        if any(isinstance(module, BaseTunerLayer) for module in sam.modules()):
            raise ValueError("`sam` has an adapter: merge it, or unload it, first.")
        check_plain(sam, "`sam`", LOAD_INSTEAD)
        vision_config = copy.deepcopy(sam.config.vision_config)
        image_size = checked_image_size(image_size, family, vision_config)
        if image_size != family.image_size(vision_config):
            family.set_image_size(vision_config, image_size)
        config = MSamConfig(
            vision_config=vision_config,
            prompt_encoder_config=copy.deepcopy(sam.config.prompt_encoder_config),
            mask_decoder_config=family.decoder_config(copy.deepcopy(sam.config.mask_decoder_config)),
            tasks=parse_tasks(tasks),
            channel_mode=channel_mode,
            base_model_type=family.model_type,
            initializer_range=sam.config.initializer_range,
        )
        config._attn_implementation = sam.config._attn_implementation
        model = cls(config).to(dtype=sam.dtype, device=sam.device)
        model._copy_weights(sam)
        model.name_or_path = sam.name_or_path
        model.config._name_or_path = sam.name_or_path
        return model.train(sam.training)

    @torch.no_grad()
    def _copy_weights(self, sam: PreTrainedModel) -> None:
        self.vision_encoder.load_state_dict(self.family.encoder_state(self.config.vision_config, sam.vision_encoder))
        self.shared_image_embedding.load_state_dict(sam.shared_image_embedding.state_dict())
        decoder_state = sam.mask_decoder.state_dict()
        for name, spec in self.task_specs.items():
            state = (
                token_decoder_state(decoder_state, spec.num_channels) if self.config.decodes_tokens else decoder_state
            )
            self.mask_decoders[name].load_state_dict(state)
            self.no_mask_embeds[name].weight.copy_(
                sam.prompt_encoder.no_mask_embed.weight.expand_as(self.no_mask_embeds[name].weight)
            )
        self.family.copy_parts(self, sam)

    @classmethod
    def from_adapter(
        cls, path_or_hub_id: str | Path, base_model: PreTrainedModel | str | Path | None = None, **kwargs: Any
    ) -> PeftModel:
        """Load a saved adapter with everything it needs. See [`peft_talora.hub.load_adapter`]."""
        return load_saved(cls, path_or_hub_id, base_model=base_model, **kwargs)

    def get_image_wide_positional_embeddings(self, device: torch.device | None = None) -> torch.Tensor:
        """SAM's dense positional encoding, (1, C, h, w), on `device` where the weight for it is not in memory."""
        weight = self.shared_image_embedding.positional_embedding
        device = weight.device if device is None or weight.device.type != "meta" else device
        size = self.config.grid_size
        centres = (torch.arange(size, device=device, dtype=weight.dtype) + 0.5) / size
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        return self.shared_image_embedding(torch.stack([x, y], dim=-1)).permute(2, 0, 1)[None]

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        image_embeddings: Features | Mapping[str, Features] | None = None,
        tasks: Sequence[str] | str | None = None,
        task_ids: TaskRequest | None = None,
        labels: Mapping[str, torch.Tensor] | None = None,
        return_dict: bool | None = None,
        trunk_states: States | None = None,
        task_chunk: int | None = None,
        loss_divisors: Mapping[str, float | torch.Tensor] | None = None,
        original_sizes: Any = None,
        reshaped_input_sizes: Any = None,
    ) -> MSamOutput | tuple[Any, ...]:
        r"""Predict the wanted tasks of every image, or one task per image.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, image_size, image_size)`): Images, as `MSamProcessor` makes
                them.
            image_embeddings (`torch.Tensor` of shape `(B, C, h, w)` or `dict`): Instead of pixel_values: the encoder's
                output, a tensor with one task or with `task_ids`, else `{task: tensor}`. In the place of a tensor a tuple of
                them, where the base's decoder takes features of several layers or resolutions: what `encode` gives.
            tasks (`list[str]`): The tasks wanted for every image; all of them by default.
            task_ids: One task per image: a LongTensor `(B,)`, or a list of names or indices. Not together with `tasks`.
            labels (`dict[str, torch.Tensor]`): Per task B rows at any resolution, integers `(B, H, W)` for "semantic"
                and "parts" and numbers `(B, C, H, W)` for the other kinds. Rows of images that do not have the task,
                and tasks that are not wanted, are ignored; a wanted task without labels is unlabelled.
            return_dict (`bool`): Return a tuple when False.
            trunk_states (`torch.Tensor` of shape `(B, h, w, D)`, or a tuple of such): Instead of pixel_values: what `encode_trunk` gives. Tasks
                that are trained one after the other then share it, where nothing in it is trained.
            task_chunk (`int`): How many tasks run through the encoder as one batch: 1 takes the least memory. All of them
                by default; with `task_ids` it does not matter.
            loss_divisors (`dict[str, float]`): Per task what the sum over its labelled images is divided by, where one
                optimiser step takes several forwards: the mean number of them per forward, as
                [`~losses.labelled_per_forward`] counts them. The mean of the F gradients, over processes (DDP) and
                accumulated forwards, is then that of one forward of all the images. By default a forward divides by the
                number of its own: the mean of the gradients is that of the whole only where all F have equally many of
                each task. (Auxiliary losses stay as they are: Conv-LoRA balances the experts of each forward.)
            original_sizes: Not used; `model(**processor(images))` passes it.
            reshaped_input_sizes: Not used, likewise.

        Returns:
            [`MSamOutput`]

        Raises:
            ValueError: The arguments contradict each other, name an unknown task or have wrong shapes.
        """
        batch_size = check_inputs(self.config, pixel_values, image_embeddings, trunk_states)
        if task_ids is None:
            names, image_index = wanted_tasks(self.task_specs, tasks), None
            check_all_labels(self.task_specs, labels, batch_size, dict.fromkeys(names))
            if image_embeddings is None:
                embeddings = encode_tasks(self, pixel_values, trunk_states, names, task_chunk)
            else:
                embeddings = given_embeddings(image_embeddings, names)
        else:
            if tasks is not None:
                raise ValueError(f"Give either tasks ({tasks!r}) or task_ids, not both.")
            ids = checked_task_ids(self.task_specs, task_ids, batch_size, self.device)
            image_index = {name: torch.nonzero(ids == t).flatten() for t, name in enumerate(self.task_specs)}
            check_all_labels(self.task_specs, labels, batch_size, image_index)
            if image_embeddings is None:
                check_task_order(self.vision_encoder, list(self.task_specs))
                encoded = self.vision_encoder(pixel_values, trunk_states=trunk_states, branches=ids)
                image_embeddings = self.family.features(self, encoded)
            embeddings = embeddings_by_task(image_embeddings, image_index)

        logits = {name: decode(self, name, embedding) for name, embedding in embeddings.items()}
        loss, losses = None, None
        if labels is not None:
            losses = task_losses(self, logits, labels, image_index, loss_divisors)
            loss = sum(self.task_specs[name].weight * value for name, value in losses.items())
            loss = loss + auxiliary_loss(self).to(loss.device)
        output = MSamOutput(loss=loss, losses=losses, logits=logits, image_index=image_index)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def encode(
        self, pixel_values: torch.Tensor, tasks: Sequence[str] | str | None = None, task_chunk: int | None = None
    ) -> dict[str, Features]:
        """The image embeddings (B, C, h, w) of the wanted tasks, to be passed to `forward` as `image_embeddings`.

        For use, not for training with Conv-LoRA: the balancing loss belongs to this call, and is not in a later forward's loss.

        Where the base's decoder takes more, they are tuples that end with it: of SAM 2 and 3 the features of two higher
        resolutions come first, of SAM-HQ the first global block's output.
        """
        check_inputs(self.config, pixel_values, None, None)
        return encode_tasks(self, pixel_values, None, wanted_tasks(self.task_specs, tasks), task_chunk)

    def encode_trunk(self, pixel_values: torch.Tensor) -> States:
        """The hidden states (B, h, w, D) before the first task-aware layer, to be passed to `forward` as `trunk_states`.

        They are those of the adapters that are active now. Where later parts take more (SAM 2's feature pyramid, SAM-HQ's
        decoder), they are a tuple.
        """
        check_inputs(self.config, pixel_values, None, None)
        return self.vision_encoder(pixel_values, trunk_only=True)

    def keep_tasks(self, names: Sequence[str]) -> None:
        """Drop the decoders and embeddings of all other tasks, for good.

        Raises:
            ValueError: A task is unknown; or the model has an adapter, which would still be one of all tasks.
        """
        names = wanted_tasks(self.task_specs, names)
        if any(isinstance(module, BaseTunerLayer | ModulesToSaveWrapper) for module in self.modules()):
            raise ValueError(
                "keep_tasks is for an mSAM without an adapter, which would still be one of all tasks: pass tasks="
                f"{names} to the forward, or merge or unload the adapter first (merge_and_unload keeps the active task)."
            )
        self.config.tasks = tasks_to_list({name: spec for name, spec in self.task_specs.items() if name in names})
        for dropped in [name for name in self.task_specs if name not in names]:
            del self.task_specs[dropped], self.no_mask_embeds[dropped], self.mask_decoders[dropped]

    def post_process(
        self, output: MSamOutput, target_sizes: Sequence[tuple[int, int]] | torch.Tensor
    ) -> list[dict[str, torch.Tensor]]:
        """Predictions at the images' own resolution.

        Args:
            output: The output of `forward` on a batch that [`MSamProcessor`] made.
            target_sizes: Height and width of each image of the batch.

        Returns:
            Per image `{task: prediction}`: a class map (H, W), a probability (H, W), metres (H, W), unit normals
            (3, H, W) or values (C, H, W).
        """
        if output.logits is None:
            raise ValueError("The output has no logits.")
        specs, size, to_square = self.task_specs, self.config.image_size, self.family.resizes_to_square
        return post_process(output.logits, specs, target_sizes, size, output.image_index, to_square)
