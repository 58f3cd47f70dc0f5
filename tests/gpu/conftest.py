"""A CUDA error poisons its process: under xdist the worker leaves at once, so that the tests after it are not blamed for it."""

from __future__ import annotations

import os
import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def healthy_context():
    yield
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            if "PYTEST_XDIST_WORKER" in os.environ:
                sys.stderr.write(f"CUDA context lost: {error}\n")
                os._exit(70)
            raise
