"""Processes of a test's own that start at once: forked from a server that has imported everything before.

A fresh interpreter takes seconds for torch and DeepSpeed, which most tests that want several processes are not about.
"""

import multiprocessing
import os
import sys
from multiprocessing import forkserver
from typing import Any

import pytest

# Also what torch and DeepSpeed import no sooner than they need it: the first optimizer takes another second or two.
_PRELOADED = [
    "deepspeed",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.profiler",
    "sklearn.datasets",
    "webdataset",
    "eqm_dist.build",
    "tests.tiny",
    "tests.distributed",
]


def forked() -> Any:
    """The multiprocessing context whose processes are forked from the server, which the first call starts.

    They have the environment of that call: what a test sets later it has to hand over.
    """
    context = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        # A server that had looked for a GPU could not hand it on: CUDA does not survive a fork.
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        context.set_forkserver_preload(_PRELOADED)
        forkserver.ensure_running()
    return context
