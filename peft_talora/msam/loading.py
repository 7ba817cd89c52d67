"""Loading the SAM that an mSAM starts from."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, SamModel


def load_sam(name_or_path: str | Path) -> SamModel:
    """Load a `SamModel` from a directory or from the Hub.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It is a checkpoint of another model; transformers alone would fill a SAM with random weights.
    """
    name = str(name_or_path)
    path = Path(name).expanduser()
    if not path.is_dir() and (path.is_absolute() or name.startswith((".", "~"))):
        raise FileNotFoundError(f"There is no SAM checkpoint: the directory '{path}' does not exist.")
    source = str(path) if path.is_dir() else name
    try:
        config = AutoConfig.from_pretrained(source)
        if config.model_type != "sam":
            raise ValueError(f"'{name}' is a checkpoint of a '{config.model_type}' model, not of a 'sam' model.")
        return SamModel.from_pretrained(source)
    except OSError as error:
        raise FileNotFoundError(
            f"'{name}' is no SAM checkpoint, neither a directory nor on the Hub: {error}"
        ) from error
