"""For how long a save stops training, against torch.save of the same state.

python -m benchmarks.bench_save [--size B] [--repeats 5] [--directory DIR]

SiT at patch size 2 on 4x32x32 latents with 1,000 classes (B has 130 M parameters): fp32 weight, two moments and one
EMA of every parameter. Under the plain engine on one rank, and under DeepSpeed with ZeRO-2 on two, each of which
writes its half. Real updates are made on one sample per rank.

- ours: how long the training thread waits: in ``Saver.begin``, and before the next update until the copy is made,
  which overlaps with the forward and backward pass. Writing, hashing and syncing go on in the background; the next
  measurement starts when they have ended.
- copy alone: the same with nothing to overlap with: ``wait_copied`` right after ``begin``.
- torch.save: of the same tensors to a new file on the same disk, until it returns; the page cache has it then.
- torch.save and fsync: until the disk has it, which is what ours comes to in the background.

They take turns in one process; percentages are what ours is of each. Of two ranks the slower one counts, for both train
together.
"""

import argparse
import json
import os
import platform
import re
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from benchmarks.bench_loader import commit, cpu_name
from eqm_dist.config import SIZES
from eqm_dist.core.corruption import constant_pace
from eqm_dist.core.decay import TruncatedDecay
from eqm_dist.core.objective import eqm_loss
from eqm_dist.data.loader import Batch
from eqm_dist.models import SiT
from eqm_dist.run_directory import CHECKPOINTS
from eqm_dist.train.checkpoint import Checkpoints
from eqm_dist.train.distributed import gather_objects, rank, world_size
from eqm_dist.train.engine import Engine, TorchEngine
from eqm_dist.train.optimizer import EmaAdamW, ema_key
from eqm_dist.train.saving import Saver
from eqm_dist.train.state import TrainState
from eqm_dist.train.step import BatchLoss, ModelWithLoss

EMA_DECAY = 0.9999
RANKS = {"torch": 1, "zero2": 2}


def build(case: str, size: str) -> Engine:
    """An engine with a model."""
    shape = SIZES[size]
    model = SiT(32, 2, 4, shape.hidden_size, shape.depth, shape.num_heads, num_classes=1000)
    loss = BatchLoss(partial(eqm_loss, decay=TruncatedDecay(0.8, 4.0), path=constant_pace), seed=0, latent_scale=1.0,
                        latent_shift=0.0, label_dropout=0.1, null_label=1000, flip=False)  # fmt: skip
    module = ModelWithLoss(model, loss)
    optimizer = EmaAdamW(module.trained_parameters().values(), lr=1e-4, ema_decays=(EMA_DECAY,))
    if case == "torch":
        engine: Engine = TorchEngine(module, optimizer, device=torch.device("cpu"))
    else:
        from eqm_dist.train.deepspeed_engine import DeepSpeedEngine

        engine = DeepSpeedEngine(module, optimizer, device=torch.device("cpu"), zero_stage=2)
    return engine


def measure(at: int, case: str, size: str, repeats: int, directory: Path) -> None:
    """All of one case on one rank; rank 0 leaves the figures in ``directory``."""
    world = RANKS[case]
    os.environ |= {"RANK": str(at), "LOCAL_RANK": str(at), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads((os.cpu_count() or 1) // world)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=at, world_size=world)
    engine = build(case, size)
    checkpoints = Checkpoints(directory / CHECKPOINTS, keep=1)
    saver = Saver(checkpoints, engine, ema_state=ema_key(EMA_DECAY), config="", max_failed=1)
    content = {f"{piece.state}/{piece.name}/{piece.start}": piece.values for piece in engine.fragments()}
    file = directory / f"torch-{at}.pt"

    batch = Batch(torch.tensor([at]), torch.randn(1, 1, 8, 32, 32), torch.tensor([at]))

    def update() -> float:
        """One update, but for what it waits for a copy; the time of both passes."""
        began = time.perf_counter()
        engine.backward(engine.losses(batch).sum() / world, last=True)
        passes_s = time.perf_counter() - began
        saver.wait_copied()
        engine.step(1e-4)
        return passes_s

    def ours(step: int) -> dict[str, float]:
        saver.begin(TrainState(step))
        passes_s = update()
        stall_s = saver.waited_s
        saver.settle()
        return {"stall_s": stall_s, "passes_s": passes_s}

    def copy_alone(step: int) -> dict[str, float]:
        used, began = _cpu_s(), time.perf_counter()
        saver.begin(TrainState(step))
        saver.wait_copied()
        stall_s = saver.waited_s
        saver.settle()
        return {"stall_s": stall_s, "whole_s": time.perf_counter() - began, "cpu_s": _cpu_s() - used}

    def theirs(sync: bool) -> dict[str, float]:
        used = _cpu_s()
        began = time.perf_counter()
        with file.open("wb") as opened:
            torch.save(content, opened)
            if sync:
                opened.flush()
                os.fsync(opened.fileno())
        return {"stall_s": time.perf_counter() - began, "cpu_s": _cpu_s() - used}

    ways: dict[str, Callable[[int], dict[str, float]]] = {
        "ours": lambda turn: ours(2 * turn),
        "copy alone": lambda turn: copy_alone(2 * turn + 1),
        "no save": lambda turn: {"stall_s": 0.0, "passes_s": update()},
        "torch.save": lambda turn: theirs(False),
        "torch.save and fsync": lambda turn: theirs(True),
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        order = list(ways.items())
        for name, way in order if turn % 2 else reversed(order):  # what one leaves in the page cache helps the next
            os.sync()  # what others have left to write must not be charged to this one
            gather_objects(None)
            found = gather_objects(way(turn))
            if turn > 0:  # the first one pays for what is done once
                runs[name].append({key: max(each[key] for each in found) for key in found[0]})
            file.unlink(missing_ok=True)
    state_bytes = sum(gather_objects(sum(values.nbytes for values in content.values())))
    if rank() == 0:
        record = {"ranks": world_size(), "parameters": sum(map(torch.Size.numel, engine.shapes.values())),
                  "state_bytes": state_bytes, "runs": runs}  # fmt: skip
        (directory / "record.json").write_text(json.dumps(record))
    dist.destroy_process_group()


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Measure, print the table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="B", help="of the model")
    parser.add_argument("--repeats", type=int, default=5, help="saves of each kind, after one that is not counted")
    parser.add_argument("--directory", type=Path, help="on the disk to be measured (default: that of temporary files)")
    options = parser.parse_args()
    cases: dict[str, Any] = {}
    for case, ranks in RANKS.items():
        directory = Path(tempfile.mkdtemp(prefix="bench-save-", dir=options.directory))
        try:
            arguments = (case, options.size, options.repeats, directory)
            multiprocessing.spawn(measure, arguments, nprocs=ranks)
            cases[case] = json.loads((directory / "record.json").read_text())
        finally:
            shutil.rmtree(directory)
    for case, found in cases.items():
        found["medians"] = {
            name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            for name, runs in found["runs"].items()
        }
        ours = found["medians"]["ours"]["stall_s"]
        alone = found["medians"]["copy alone"]
        found["copy_bytes_per_s_per_rank"] = found["state_bytes"] / found["ranks"] / alone["stall_s"]
        found["write_bytes_per_cpu_s"] = found["state_bytes"] / found["ranks"] / alone["cpu_s"]
        print(
            f"{case}, {found['ranks']} ranks, {found['parameters']:,} parameters, {found['state_bytes'] / 1e9:.2f} GB"
        )
        for name, median in found["medians"].items():
            part = f"{ours / median['stall_s']:7.1%}" if median["stall_s"] else ""
            print(f"  {name:22} training waits {median['stall_s']:7.3f} s  {part:>8}", end="")
            others = {key: value for key, value in median.items() if key != "stall_s"}
            print("".join(f"  {key} {value:.2f}" for key, value in others.items()))
        print(f"  copied {found['copy_bytes_per_s_per_rank'] / 1e9:.2f} GB/s per rank")
    now = datetime.now(UTC)
    versions = {name: version(name) for name in ("torch", "deepspeed")}
    record: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.bench_save", *sys.argv[1:]]),
        "date": now.isoformat(timespec="seconds"),
        "commit": commit(),
        "hardware": {"cpu": cpu_name(), "cores": os.cpu_count(), "load": os.getloadavg()},
        "versions": {"python": platform.python_version(), **versions},
        "size": options.size,
        "cases": cases,
    }
    slug = re.sub(r"[^a-z0-9]+", "-", cpu_name().lower()).strip("-")
    path = Path(__file__).parent / "results" / f"save_{slug}_{now:%Y-%m-%d}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
