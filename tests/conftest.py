"""Small models for all tests."""

import pytest
import torch
from small_models import make_sam
from transformers import SamModel
from transformers.utils import logging

logging.disable_progress_bar()
# the models here are so small that a second thread only waits
torch.set_num_threads(1)


@pytest.fixture
def sam() -> SamModel:
    return make_sam()


@pytest.fixture
def sam_factory():
    return make_sam


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
