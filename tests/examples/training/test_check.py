"""The look at the data before the first step."""

import json
import re
import warnings

import numpy as np
import pytest
import train_multitask as script
from PIL import Image
from small_folders import write_folder

from peft_talora.kinds import doubts

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "data", number=6, splits={"test": ["0"], "val": ["1"]})


@pytest.fixture
def options(base, folder, tmp_path):
    return ["--base", base, "--dataset", f"folder:{folder}", "--steps", "1", "--output-dir", str(tmp_path / "run")]


def spoil(folder):
    Image.fromarray(np.full((12, 16), 7, "uint8")).save(folder / "labels/3.png")


def test_check_stops_before_training(options, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        script.main([*options, "--check"])
    assert end.value.code == 0
    output = capsys.readouterr().out
    assert "train: 4 images, 16 x 12" in output and "2 of 2 classes: background" in output
    assert (tmp_path / "run/check.png").is_file() and not (tmp_path / "run/adapter_config.json").exists()
    # the folder is the script's own now
    script.main(options)
    assert (tmp_path / "run/check.png").is_file() and (tmp_path / "run/adapter_config.json").is_file()


def test_a_bad_file_is_told_before_the_first_step(options, folder, tmp_path, capsys):
    spoil(folder)
    with pytest.raises(ValueError, match=r"begin with ERROR say why; --skip-bad-files leaves out rows") as error:
        script.main(options)
    told = capsys.readouterr().out
    assert re.search(r"(?s)ERROR: train: 1 of 4 rows cannot be read.*labels/3\.png.*class id 7", told)
    # once is enough
    assert "3.png" not in str(error.value)
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit) as end:
        script.main([*options, "--check"])
    assert end.value.code == 1


def test_what_the_report_doubts_is_not_warned_of_again(base, tmp_path, capsys):
    tasks = {"semantic": {"files": "labels", "num_classes": 2, "ignore": 255}}
    data = write_folder(tmp_path / "white", tasks, 6, lambda mask: 255 * mask, splits={"test": ["0"]})
    doubts.forget()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        script.main(
            ["--base", base, "--dataset", f"folder:{data}", "--steps", "1", "--output-dir", str(tmp_path / "run")]
        )
    assert capsys.readouterr().out.count("it holds 0 and 255 alone") == 2  # train and test
    assert not [warning for warning in warned if "0 and 255" in str(warning.message)]


def test_bad_files_are_left_out_when_asked(options, folder, tmp_path, capsys):
    spoil(folder)
    script.main([*options, "--skip-bad-files"])
    assert "train: 1 of 4 rows are left out" in capsys.readouterr().out
    assert json.loads((tmp_path / "run/metrics.json").read_text())["steps"] == 1
