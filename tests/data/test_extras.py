"""Data without the libraries that only some of its sources need."""

import sys

import numpy as np
import pytest
from small_models import make_sam

from peft_talora import MSamForMultiTask, MSamProcessor
from peft_talora.data import MultiTaskDataset, detect_tasks, load_multitask_dataset


def test_without_datasets_lists_work_and_the_rest_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "train-0.parquet").write_bytes(b"any")
    for source in ("someone/rows", str(tmp_path)):
        with pytest.raises(ImportError, match=r"pip install 'peft-talora\[data\]'"):
            load_multitask_dataset(source)
    rows = [{"image": np.zeros((8, 8, 3), "uint8"), "depth": np.ones((1, 8, 8), "float32")}]
    tasks = detect_tasks(rows)
    processor = MSamProcessor.from_model(MSamForMultiTask.from_sam(make_sam(), tasks))
    assert MultiTaskDataset(rows, tasks, processor)[0]["labels"]["depth"].shape == (1, 32, 32)
