"""Folders of image and label files, under their former name; see [`peft_talora.data`]."""

from .data.folder.rows import load_folder_dataset

__all__ = ["load_folder_dataset"]
