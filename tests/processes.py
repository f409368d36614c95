"""Processes of a test's own: how they start at once, and how a test waits for what they do.

A fresh interpreter takes seconds for torch and DeepSpeed, which most tests that want several processes are not about.
So theirs are forked from a server that has imported everything before.
"""

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
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
    "boto3.session",
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


def wait_for(
    condition: Callable[[], object], process: subprocess.Popen[str] | None = None, deadline_s: float = 240
) -> None:
    """Return once the condition holds; that it takes too long, or that the process ends before, fails the test."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert process is None or process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, f"it did not get so far within {deadline_s:g} s"
        time.sleep(0.02)
