"""torch-fidelity's own results, computed in a process of their own.

There torchvision imports also beside a CPU build of torch: the operators whose absence stops it are declared first, and
none of them is ever called.
"""

import contextlib
import io
import json
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.processes import forked

OPERATORS = """
import torch
try:
    import torchvision
except RuntimeError:
    import sys
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
"""Makes torchvision importable."""


def run(code: str, *arguments: str | Path) -> Any:
    """What the last line that ``code`` prints says as JSON; ``sys.argv[1:]`` are the arguments."""
    context = forked()
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_execute, args=(OPERATORS + code, [str(each) for each in arguments], send))
    process.start()
    send.close()
    with receive:
        printed, error = receive.recv()
    process.join()
    assert error is None, error
    return json.loads(printed.splitlines()[-1])


def _execute(code: str, arguments: list[str], send: Connection) -> None:
    sys.argv = ["fidelity", *arguments]
    printed, error = io.StringIO(), None
    try:
        with contextlib.redirect_stdout(printed):
            exec(code, {})
    except Exception:
        error = traceback.format_exc()
    send.send((printed.getvalue(), error))
