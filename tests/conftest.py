"""Shapes in annotations are checked while tests run, and only then.

Only modules that compute on tensors: a Protocol as a parameter is beartype's business too, and refuses every fake.
"""

import logging

import pytest
import torch
from jaxtyping import install_import_hook

CHECKED = ["mmcl.dist", "mmcl.losses", "mmcl.monitors", "mmcl.towers", "mmcl_data.decode", "mmcl_evals.metrics"]

install_import_hook(CHECKED, "beartype.beartype")
torch.set_num_threads(1)  # tensors are tiny, and ranks run side by side


@pytest.fixture(autouse=True)
def _no_console_left_behind():
    """A command run in process logs to the stderr of its test, which is closed after it."""
    log = logging.getLogger("mmcl")
    before = list(log.handlers)
    yield
    log.handlers[:] = before
