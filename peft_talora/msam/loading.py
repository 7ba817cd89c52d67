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
    model_type = checkpoint_type(name_or_path)
    if model_type != "sam":
        raise ValueError(f"'{name_or_path}' is a checkpoint of a '{model_type}' model, not of a 'sam' model.")
    try:
        return SamModel.from_pretrained(_source(name_or_path))
    except OSError as error:
        raise _not_found(name_or_path, error) from error


def checkpoint_type(name_or_path: str | Path) -> str:
    """The model type of a checkpoint: "sam", "msam", or that of another model.

    Raises:
        FileNotFoundError: There is no such checkpoint.
    """
    try:
        return AutoConfig.from_pretrained(_source(name_or_path), trust_remote_code=False).model_type
    except OSError as error:
        raise _not_found(name_or_path, error) from error


def _source(name_or_path: str | Path) -> str:
    name = str(name_or_path)
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")):
        raise FileNotFoundError(f"There is no SAM checkpoint: the directory '{path}' does not exist.")
    return name


def _not_found(name_or_path: str | Path, error: OSError) -> FileNotFoundError:
    return FileNotFoundError(f"'{name_or_path}' is no SAM checkpoint, neither a directory nor on the Hub: {error}")
