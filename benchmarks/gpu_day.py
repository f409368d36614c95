"""All that has to be seen on a GPU, in one command of ten minutes at most: `make gpu`.

python -m benchmarks.gpu_day [--out DIR] [--official PATH]
python -m benchmarks.gpu_day --cluster        what needs DeepSpeed and Ray as well: `make gpu-cluster`

Tests of the device against the CPU, then the benchmarks of a step and of a sampler, then a trace. It needs torch,
pytest, pydantic, PyYAML and safetensors, no network and, without ``--cluster``, neither Ray nor DeepSpeed. Each stage
is a process with a deadline of its own; one that fails is told of and does not stop the others. Where there is no GPU
everything runs on the CPU at small size and uncompiled, so that on the day only the device is new.

What it leaves in DIR: records as ``WHAT_DEVICE_DATE.json``, ``trace.json.gz`` (for https://ui.perfetto.dev), and
``gpu_day.log`` with all that was printed.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.record import RESULTS, device_name

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Stage:
    """A part of the day.

    Attributes:
        name: what is seen.
        command: arguments of Python.
        limit_s: when it is given up.
    """

    name: str
    command: Sequence[str]
    limit_s: float


def stages(on_gpu: bool, out: Path, official: Path | None) -> list[Stage]:
    """What needs nothing but torch."""
    tests = "cuda or tf32" if on_gpu else "not cuda and not tf32 and not compile"
    steps: list[list[str]] = [
        ["--sizes", "S", "--batches", "1", "--cases", "fp32,bf16", "--rounds", "1", "--steps", "1"]
    ]
    sampler = ["--size", "S", "--batch", "1", "--nfe", "2", "--cases", "fp32,bf16", "--rounds", "1"]
    trace = ["--size", "S", "--batch", "1"]
    if on_gpu:
        steps = [
            ["--sizes", "XL", "--batches", "32,128", "--cases", "bf16,bf16+compile", "--rounds", "2", "--steps", "10"],
            ["--sizes", "S,B", "--batches", "128", "--cases", "fp32,tf32,bf16,bf16+compile", "--rounds", "2"],
        ]
        sampler = ["--size", "XL", "--batch", "64", "--nfe", "30", "--rounds", "1",
                   "--cases", "fp32,tf32,bf16,bf16+compile,bf16+compile+adaptive"]  # fmt: skip
        trace = ["--size", "XL", "--batch", "32", "--compile"]
    if official:
        steps[0] += ["--official", str(official.resolve())]
    bare = ["--noconftest", "-p", "no:cacheprovider", "-o", "addopts=", "-W", "default", "-q", "-k", tests]
    return [
        Stage("the device against the CPU", ["-m", "pytest", "tests/test_device.py", *bare], 180),
        *(
            Stage(f"a step, {each[1]}", ["-m", "benchmarks.bench_step", *each, "--out", str(out / f"{at}")], 180)
            for at, each in enumerate(steps)
        ),
        Stage("a sampler", ["-m", "benchmarks.bench_sampler", *sampler, "--out", str(out)], 120),
        Stage("a trace", ["-m", "benchmarks.trace_step", *trace, "--out", str(out / "trace.json.gz")], 60),
    ]


def cluster_stages(on_gpu: bool, out: Path) -> list[Stage]:
    """What needs DeepSpeed and Ray."""
    size = ["--sizes", "XL" if on_gpu else "S", "--batches", "32" if on_gpu else "2"]
    cases = "bf16,bf16+deepspeed" + ",bf16+compile+deepspeed" * on_gpu
    digits = ["--run.root", str(out / "runs"), "--run.name", "digits", "--train.steps", "400" if on_gpu else "20",
              "--evaluation.every", "0", "--train.precision", "bf16"]  # fmt: skip
    return [
        Stage("a save beside training", ["-m", "pytest", "tests/test_saving.py", "-q", "-m", "gpu"], 120),
        Stage(
            "a step under DeepSpeed",
            ["-m", "benchmarks.bench_step", *size, "--cases", cases, "--rounds", "1", "--out", str(out / "deepspeed")],
            180,
        ),
        Stage("a run on Ray", ["pipelines/train.py", *digits], 240),
    ]


def main() -> int:
    """Run all stages; the exit code says whether all ended well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu", metavar="DIR", help="(default: %(default)s)")
    parser.add_argument(
        "--official", type=Path, metavar="PATH", help="a checkout of the official code, to compare with"
    )
    parser.add_argument("--cluster", action="store_true", help="the stages that need DeepSpeed and Ray instead")
    arguments = parser.parse_args()
    on_gpu, out = torch.cuda.is_available(), arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    device = device_name(torch.device("cuda" if on_gpu else "cpu"))
    patience = 1 if on_gpu else 5  # ten minutes are meant for a GPU, not for a busy laptop
    print(f"{device}, torch {torch.__version__}" + "; no GPU: everything at small size" * (not on_gpu), flush=True)
    day = cluster_stages(on_gpu, out) if arguments.cluster else stages(on_gpu, out, arguments.official)
    failed = [stage.name for stage in day if not _run(stage, patience, out / "gpu_day.log")]
    print(f"records and log in {out}" + f"; failed: {', '.join(failed)}" * bool(failed))
    return 1 if failed else 0


def _run(stage: Stage, patience: float, log: Path) -> bool:
    began = time.monotonic()
    with log.open("a") as file:
        print(f"\n== {stage.name}: python {' '.join(stage.command)}", file=file, flush=True)
        try:
            done = subprocess.run(
                [sys.executable, *stage.command],
                cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=patience * stage.limit_s, check=False,
            )  # fmt: skip
            # 5: of the tests none is for this device
            outcome = "well" if done.returncode in (0, 5) else f"failed with exit code {done.returncode}, see {log}"
        except subprocess.TimeoutExpired:
            outcome = f"given up after {patience * stage.limit_s:.0f} s, see {log}"
    print(f"{stage.name:<32} {time.monotonic() - began:6.1f} s  {outcome}", flush=True)
    return outcome == "well"


if __name__ == "__main__":
    sys.exit(main())
