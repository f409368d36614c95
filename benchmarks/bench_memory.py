"""What a worker holds: bytes of model state under every engine, and of activations, against the formula in the docs.

python -m benchmarks.bench_memory [--size S] [--batch 4]

State. SiT at patch size 2 on 4x32x32 latents with 1,000 classes, in fp32, on one and on two ranks of this machine that
make real updates. All tensors that live in a rank's process, less those that did so before the engine was made, are
counted by their storages, between updates and while the optimizer updates: nothing is estimated. What is there only
then is the gradient; what is always there and no state is a buffer.

Activations. What a forward pass keeps for the backward pass, by the storages of the tensors that autograd saves, less
the parameters: with and without ``train.activation_checkpointing``, in fp32 and bf16.
"""

import argparse
import gc
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor

from benchmarks.bench_loader import cpu_name
from eqm_dist.config import SIZES
from eqm_dist.core.decay import TruncatedDecay
from eqm_dist.core.objective import eqm_loss
from eqm_dist.data.loader import Batch
from eqm_dist.models import SiT
from eqm_dist.provenance import provenance
from eqm_dist.train.engine import WEIGHT, Engine, TorchEngine
from eqm_dist.train.optimizer import EmaAdamW
from eqm_dist.train.step import BatchLoss, ModelWithLoss

EMA_DECAYS = (0.999, 0.9999)
CPU = torch.device("cpu")
STATES = (WEIGHT, "exp_avg", "ema_")
CASES: dict[str, dict[str, Any] | None] = {
    "plain": None,
    **{f"ZeRO {stage}": {"zero_stage": stage} for stage in range(4)},
    **{f"ZeRO {stage}, offload": {"zero_stage": stage, "offload": True} for stage in (1, 2, 3)},
}


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of every storage by its address."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            found[storage.data_ptr()] = storage.nbytes()
    return found


def living() -> dict[int, int]:
    """Storages of all tensors of this process that Python knows of."""
    gc.collect()
    return storages(each for each in gc.get_objects() if issubclass(type(each), Tensor))


def build_model(shape: dict[str, int], **options: bool) -> SiT:
    """A model on 4x32x32 latents."""
    return SiT(32, 2, 4, **shape, num_classes=1000, **options)


def build_engine(model: SiT, case: str) -> Engine:
    """The engine of a case."""
    loss = BatchLoss(partial(eqm_loss, decay=TruncatedDecay(0.8, 4.0)), seed=0, latent_scale=1.0, latent_shift=0.0,
                        label_dropout=0.1, null_label=1000, flip=False)  # fmt: skip
    module = ModelWithLoss(model, loss)
    optimizer = EmaAdamW(module.trained_parameters().values(), lr=1e-4, ema_decays=EMA_DECAYS)
    options = CASES[case]
    if options is None:
        return TorchEngine(module, optimizer, device=CPU)
    from eqm_dist.train.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(module, optimizer, device=CPU, **options)


def state_bytes(rank: int, world: int, case: str, shape: dict[str, int]) -> dict[str, int]:
    """What this rank holds, by kind, in bytes. A collective."""
    batch = Batch(torch.tensor([rank]), torch.randn(1, 1, 8, 32, 32), torch.tensor([rank]))
    before = living()
    model = build_model(shape)
    trained = [param for param in model.parameters() if param.requires_grad]
    parameters = sum(param.numel() for param in trained)
    engine = build_engine(model, case)
    seen: list[dict[int, int]] = []

    def look(norm: float) -> bool:
        seen.append(living())
        return True

    for _ in range(2):
        engine.backward(engine.losses(batch).sum() / world, last=True)
        engine.step(1e-4, look)
    pieces = engine.fragments()
    kinds = {kind: storages(piece.values for piece in pieces if piece.state.startswith(kind)) for kind in STATES}
    # The engine's copy of what is not trained lies in host memory.
    known = {at for kind in kinds.values() for at in kind} | before.keys() | storages(engine.frozen.values()).keys()
    # Under ZeRO 3 a parameter is this rank's part, besides which small ones stay whole.
    for kind, tensors in {
        "computing": [getattr(param, "ds_tensor", param.data) for param in trained],
        "kept whole": [param.data for param in model.parameters()],
    }.items():
        kinds[kind] = {at: size for at, size in storages(tensors).items() if at not in known}
        known |= kinds[kind].keys()
    buffers = {at: size for at, size in living().items() if at not in known}
    known |= buffers.keys()
    return {
        "parameters": parameters,
        **{kind: sum(found.values()) for kind, found in kinds.items()},
        "buffers": sum(buffers.values()),
        "gradient": sum(size for at, size in seen[-1].items() if at not in known),
    }


def activation_bytes(shape: dict[str, int], batch: int, bf16: bool, checkpoint: bool) -> int:
    """What one forward pass keeps for its backward pass."""
    model = build_model(shape, checkpoint_blocks=checkpoint)
    own, kept = storages(param.data for param in model.parameters()), {}

    def pack(tensor: Tensor) -> Tensor:
        kept.update(storages([tensor]))
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        field = model(torch.randn(batch, 4, 32, 32), torch.arange(batch))
    assert field.requires_grad
    return sum(size for at, size in kept.items() if at not in own)


def on_ranks(world: int, function: Callable[..., dict[str, int]], *arguments: Any) -> list[dict[str, int]]:
    """``function(rank, world, *arguments)`` on every rank, in processes of their own."""
    with tempfile.TemporaryDirectory() as directory:
        # Every measurement begins in a fresh process, forked from one that has imported everything.
        multiprocessing.get_context("forkserver").set_forkserver_preload([__name__, "deepspeed"])
        multiprocessing.start_processes(
            _rank, (world, directory, function, arguments), nprocs=world, start_method="forkserver"
        )
        return [json.loads((Path(directory) / f"{rank}.json").read_text()) for rank in range(world)]


def _rank(rank: int, world: int, directory: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=world)
    (Path(directory) / f"{rank}.json").write_text(json.dumps(function(rank, world, *arguments)))
    dist.destroy_process_group()


def main() -> None:
    """Measure everything; write the record and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="S")
    parser.add_argument("--batch", type=int, default=4)
    arguments = parser.parse_args()
    shape = SIZES[arguments.size]._asdict()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

    state = {case: {world: on_ranks(world, state_bytes, case, shape) for world in (1, 2)} for case in CASES}
    activations = {
        f"{precision}, {'computed again' if checkpoint else 'kept'}": activation_bytes(
            shape, arguments.batch, precision == "bf16", checkpoint
        )
        for precision in ("fp32", "bf16")
        for checkpoint in (False, True)
    }
    record = {
        "what": "bytes of model state per rank, and of activations of one forward pass",
        "command": f"python -m benchmarks.bench_memory --size {arguments.size} --batch {arguments.batch}",
        "size": arguments.size, "batch": arguments.batch, "emas": len(EMA_DECAYS), "cpu": cpu_name(),
        "state": state, "activations": activations, **provenance(),
    }  # fmt: skip
    name = re.sub(r"[^a-z0-9]+", "-", "-".join(cpu_name().lower().split()[:2]))
    path = Path(__file__).parent / "results" / f"memory_{name}_{datetime.now(UTC):%Y-%m-%d}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")

    kinds = [kind for kind in state["plain"][1][0] if kind != "parameters"]
    print("| engine | ranks | " + " | ".join(kinds) + " |")
    print("|---" * (len(kinds) + 2) + "|")
    for case, worlds in state.items():
        for world, ranks in worlds.items():
            largest = {kind: max(each[kind] for each in ranks) / ranks[0]["parameters"] for kind in kinds}
            print(f"| {case} | {world} | " + " | ".join(f"{value:.2f}" for value in largest.values()) + " |")
    print("bytes per trained parameter, of the rank that holds most")
    for case, size in activations.items():
        print(f"{case}: {size / arguments.batch / 2**20:.1f} MiB an image")


if __name__ == "__main__":
    main()
