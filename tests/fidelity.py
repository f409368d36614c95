"""torch-fidelity's own results, computed in a process of their own.

There torchvision imports also beside a CPU build of torch: the operators whose absence stops it are declared first, and
none of them is ever called.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

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
    done = subprocess.run(
        [sys.executable, "-c", OPERATORS + code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
