"""Small models for all tests."""

import gc
import os
import traceback

# the models here are so small that a second thread only waits, in the processes that tests start, too
os.environ.setdefault("OMP_NUM_THREADS", "1")

import huggingface_hub.constants
import pytest
import torch
from small_models import make_sam
from transformers import SamModel
from transformers.utils import logging

logging.disable_progress_bar()
torch.set_num_threads(1)
# what the imports leave is not looked through for garbage again and again
gc.freeze()
gc.set_threshold(50_000, 20, 50)


def pytest_addoption(parser):
    parser.addoption(
        "--newest",
        action="store_true",
        help="skip what transformers refuses to do with the PEFT that is installed, for runs with the newest versions",
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    except ValueError as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        if item.config.getoption("--newest") and where.name == "check_peft_version":
            pytest.skip(f"transformers: {error}")
        raise


@pytest.fixture
def sam() -> SamModel:
    return make_sam()


@pytest.fixture
def sam_factory():
    return make_sam


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def sam_path(sam, tmp_path):
    """A SAM's checkpoint."""
    sam.save_pretrained(tmp_path / "sam")
    return tmp_path / "sam"


@pytest.fixture
def offline(monkeypatch):
    """No network, whatever the environment says."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def pixels():
    """Two images for the models of the `sam_path`."""
    return torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))
