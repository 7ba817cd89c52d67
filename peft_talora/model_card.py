"""The model card of a saved adapter."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel
from safetensors import safe_open

METHOD_NAMES = {"TALORA": "TA-LoRA", "CONVLORA": "Conv-LoRA", "LORA": "LoRA"}
METHOD_TAGS = {"TALORA": "ta-lora", "CONVLORA": "conv-lora", "LORA": "lora"}


def model_card(model: PeftModel, weights: Path, metrics: dict[str, Any] | None = None) -> str:
    """The README.md of an adapter of an mSAM: what it predicts, how well, and how to load it.

    Args:
        model: The PeftModel around an `MSamForMultiTask`.
        weights: The saved weights, for their number and size.
        metrics: `{task: {metric: value}}`.
    """
    msam = model.get_base_model()
    peft_type = model.peft_config[model.active_adapter].peft_type.value
    method = METHOD_NAMES.get(peft_type, peft_type)
    base = msam.name_or_path or None
    data = ModelCardData(
        library_name="peft",
        base_model=base if base and not Path(base).exists() else None,
        license="apache-2.0",
        tags=["peft", METHOD_TAGS.get(peft_type, peft_type.lower()), "segment-anything"],
    )
    saved, total = _num_parameters(weights), model.get_nb_trainable_parameters()[1]
    lines = [
        "---",
        data.to_yaml(),
        "---",
        "",
        f"# {method} adapter of a Segment Anything Model for {', '.join(msam.task_specs)}",
        "",
        "```python",
        "from peft_talora import MSamForMultiTask",
        "",
        'model = MSamForMultiTask.from_adapter("this directory or Hub id")',
        "```",
        "",
        f"- base model: {base or 'not recorded'}",
        f"- image size: {msam.config.vision_config.image_size} pixels",
        f"- parameters saved: {saved:,} of {total:,}, {weights.stat().st_size:,} bytes",
        "",
        "| task | kind | channels | classes |",
        "|---|---|---|---|",
    ]
    for name, spec in msam.task_specs.items():
        lines.append(f"| {name} | {spec.kind} | {spec.num_channels} | {', '.join(spec.class_names or []) or '-'} |")
    if metrics:
        lines += ["", "| task | metric | value |", "|---|---|---|"]
        for name, values in metrics.items():
            lines += [f"| {name} | {k} | {v:.4g} |" for k, v in values.items() if v is not None]
    lines += ["", "Made with peft_talora.", ""]
    return str(ModelCard("\n".join(lines)))


def _num_parameters(weights: Path) -> int:
    with safe_open(weights, "pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
