import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.backends.cudnn.allow_tf32 = False                                    # comparisons are in float32


@pytest.fixture
def device():
    return torch.device(os.environ.get("DQ_TEST_DEVICE", "cpu"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
