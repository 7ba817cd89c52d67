"""The model card of a saved adapter."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import PeftModel
from safetensors import safe_open

from ..msam.tasks import TaskSpec

METHOD_NAMES = {"TALORA": "TA-LoRA", "CONVLORA": "Conv-LoRA", "LORA": "LoRA"}
# the Hub's names of what a kind of task is; it has none for the others
HUB_TASKS = {
    "semantic": "image-segmentation",
    "parts": "image-segmentation",
    "binary": "image-segmentation",
    "depth": "depth-estimation",
}
OTHER_HUB_TASK = "image-to-image"
# of a card that has to name what it was measured on, and was not told
UNKNOWN_DATASET = "not recorded"


def model_card(
    model: PeftModel,
    weights: Path,
    metrics: dict[str, Any] | None = None,
    *,
    dataset: str | None = None,
    license: str = "apache-2.0",
    hub_id: str | None = None,
) -> str:
    """The README.md of an adapter of an mSAM: what it predicts, how well, and how to load it.

    Args:
        model: The PeftModel around an `MSamForMultiTask`.
        weights: The saved weights, for their number and size.
        metrics: `{task: {metric: value}}`; values that are None, or not finite, are left out.
        dataset: What the metrics were measured on.
        license: The adapter's, as the Hub names licences.
        hub_id: The adapter's name on the Hub, if it has one.
    """
    msam = model.get_base_model()
    peft_type = model.peft_config[model.active_adapter].peft_type.value
    method = METHOD_NAMES.get(peft_type, peft_type)
    metrics = _measured(metrics)
    title = f"{method} adapter of a Segment Anything Model for {', '.join(msam.task_specs)}"
    data = _card_data(method, msam, metrics, title=title, dataset=dataset, license=license, hub_id=hub_id)
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {title}",
        _how_to_load(msam.name_or_path, hub_id),
        _facts(model, weights, license),
        _task_table(msam.task_specs),
    ]
    if metrics:
        sections.append(_metric_table(metrics, dataset))
    sections.append("Made with peft_talora.")
    return str(ModelCard("\n\n".join(sections) + "\n"))


def is_hub_id(name: str | None) -> bool:
    """Whether `name` is one that a repository on the Hub can have, and no local file or directory."""
    if not name or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _measured(metrics: dict[str, Any] | None) -> dict[str, dict[str, float]]:
    return {
        task: {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
        for task, values in (metrics or {}).items()
    }


def _card_data(
    method: str,
    msam: Any,
    metrics: dict[str, dict[str, float]],
    *,
    title: str,
    dataset: str | None,
    license: str,
    hub_id: str | None,
) -> ModelCardData:
    results = [
        EvalResult(
            task_type=_hub_task(msam.task_specs.get(task)),
            dataset_type=dataset or UNKNOWN_DATASET,
            dataset_name=dataset or UNKNOWN_DATASET,
            metric_type=metric,
            metric_name=f"{task}: {metric}",  # two tasks may be of one type
            metric_value=float(value),
        )
        for task, values in metrics.items()
        for metric, value in values.items()
    ]
    return ModelCardData(
        library_name="peft",
        base_model=msam.name_or_path if is_hub_id(msam.name_or_path) else None,
        datasets=[dataset] if dataset is not None and is_hub_id(dataset) and "/" in dataset else None,
        license=license,
        tags=["peft", method.lower(), "segment-anything"],
        model_name=(hub_id or title) if results else None,
        eval_results=results or None,
    )


def _hub_task(spec: TaskSpec | None) -> str:
    return HUB_TASKS.get(spec.kind, OTHER_HUB_TASK) if spec else OTHER_HUB_TASK


def _how_to_load(base: str | None, hub_id: str | None) -> str:
    arguments = json.dumps(hub_id or "this directory or Hub id")
    if not base or (hub_id and not is_hub_id(base)):
        # nobody else has the directory that the SAM was loaded from
        arguments += ', base_model="the SAM that it was trained on"'
    code = f"from peft_talora import MSamForMultiTask\n\nmodel = MSamForMultiTask.from_adapter({arguments})"
    return f"```python\n{code}\n```"


def _facts(model: PeftModel, weights: Path, license: str) -> str:
    msam = model.get_base_model()
    with safe_open(weights, "pt") as file:
        saved = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return "\n".join(
        [
            f"- base model: {escaped(msam.name_or_path or 'not recorded')}",
            f"- image size: {msam.config.image_size} pixels",
            f"- parameters saved: {saved:,} of {model.get_nb_trainable_parameters()[1]:,}, "
            f"{weights.stat().st_size:,} bytes",
            f"- licence: {escaped(license)}",
        ]
    )


def _task_table(tasks: dict[str, TaskSpec]) -> str:
    rows = [
        [name, spec.kind, str(spec.num_channels), ", ".join(spec.class_names or []) or "-"]
        for name, spec in tasks.items()
    ]
    return _table(["task", "kind", "channels", "classes"], rows)


def _metric_table(metrics: dict[str, dict[str, float]], dataset: str | None) -> str:
    rows = [[task, name, f"{value:.4g}"] for task, values in metrics.items() for name, value in values.items()]
    return f"Measured on: {escaped(dataset or UNKNOWN_DATASET)}\n\n{_table(['task', 'metric', 'value'], rows)}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [" | ".join(header), *(" | ".join(map(escaped, row)) for row in rows)]
    lines = [f"| {line} |" for line in lines]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def escaped(text: str) -> str:
    """One line of Markdown that shows `text` as it is: no cell, link, emphasis, HTML or formula of its own."""
    text = " ".join(str(text).split())
    return re.sub(r"[\\`*~\[\]<>|&$#]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", lambda match: f"\\{match[0]}", text)
