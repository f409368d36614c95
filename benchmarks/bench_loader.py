"""How fast samples come out of shards, what that costs, and how fast a run is back where it was.

python benchmarks/bench_loader.py [--samples 8192] [--repeats 5] [--directory DIR]

Moments of 4x32x32 latents (8 channels, fp16, 16 KiB a sample) in shuffled batches of 256, by one process without
worker processes: this loader, stock webdataset over the same tars, and a torch DataLoader over one .npy file a sample.
Every figure is from a process of its own; the cases take turns, and the medians of the repeats are compared. Cold: the
first epoch after the files were dropped from the page cache, checksums included. Warm: the second epoch.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from webdataset.writer import TarWriter

from eqm_dist.data.index import INDEX_DTYPE, index_shard, write_index
from eqm_dist.data.loader import Loader, ShardReader
from eqm_dist.data.manifest import Manifest, ShardRecord, file_record, write_manifest
from eqm_dist.data.order import SampleOrder
from eqm_dist.storage.open import open_folder

SHAPE = (1, 8, 32, 32)
SHARD_SAMPLES = 256
WINDOW_SHARDS = 8
BATCH = 256
CASES = ("ours", "webdataset", "files")


# --- the data ---


def write_data(directory: Path, samples: int) -> None:
    """The same made-up moments as shards and as one file a sample."""
    shards, records = [], []
    files = directory / "files"
    files.mkdir()
    for number, start in enumerate(range(0, samples, SHARD_SAMPLES)):
        random = np.random.default_rng(number)
        path = directory / f"bench-{number:06d}.tar"
        with path.open("wb") as file, TarWriter(file) as tar:
            for index in range(start, min(start + SHARD_SAMPLES, samples)):
                moments = random.normal(size=SHAPE).astype(np.float16)
                tar.write({"__key__": f"{index:08d}", "moments.npy": moments, "cls": index % 1000})
                np.save(files / f"{index:08d}.npy", moments)
        found = index_shard(path)
        shards.append(ShardRecord(**file_record(path).model_dump(), samples=len(found.records)))
        records.append(found.records)
    write_manifest(open_folder(directory), made_up_manifest(directory, shards, np.concatenate(records), SHAPE))


def write_sparse_data(directory: Path, samples: int) -> None:
    """A data set of one-pixel samples whose shards are holes: all of its index, none of its disk."""
    shard_samples, distance = 1000, 1536
    shards = []
    for number in range(samples // shard_samples):
        path = directory / f"bench-{number:06d}.tar"
        with path.open("wb") as file:
            file.truncate(shard_samples * distance)
        shards.append(
            ShardRecord(name=path.name, bytes=shard_samples * distance, sha256="0" * 64, samples=shard_samples)
        )
    records = np.empty(samples, INDEX_DTYPE)
    records["offset"] = np.arange(samples) % shard_samples * distance + 640
    records["label"] = np.arange(samples) % 1000
    write_manifest(open_folder(directory), made_up_manifest(directory, shards, records, (1, 2, 1, 1)))


def made_up_manifest(
    directory: Path, shards: list[ShardRecord], records: np.ndarray, shape: tuple[int, int, int, int]
) -> Manifest:
    """The manifest of made-up moments; writes their index."""
    return Manifest(
        name="bench",
        source="normal deviates",
        autoencoder="none",
        latent_scale=1.0,
        latent_shift=0.0,
        dtype="float16",
        moments_shape=shape,
        num_classes=1000,
        label_histogram=tuple(np.bincount(records["label"], minlength=1000).tolist()),
        shards=tuple(shards),
        index=write_index(open_folder(directory), records),
    )


def drop_from_page_cache(directory: Path) -> None:
    """Make the next reads come from the disk, as far as the kernel heeds the advice."""
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


# --- what is measured, each in a process of its own ---


def ours(directory: Path, samples: int) -> Callable[[int], Iterable[int]]:
    """Epoch -> sizes of its batches."""
    reader = ShardReader(directory)
    order = SampleOrder(reader.shard_sizes, seed=0, window_shards=WINDOW_SHARDS)
    loader = Loader(reader, order, global_batch=BATCH, rank=0, world=1)
    steps = samples // BATCH
    return lambda epoch: (len(batch.moments) for batch in loader.batches(epoch * steps, (epoch + 1) * steps))


def webdataset(directory: Path, samples: int) -> Callable[[int], Iterable[int]]:
    """Stock webdataset as its documentation uses it, with a shuffle buffer of as many samples as our window has."""
    from webdataset.compat import WebDataset

    shards = [str(path) for path in sorted(directory.glob("*.tar"))]
    dataset = WebDataset(shards, shardshuffle=len(shards), seed=0, empty_check=False)
    dataset = dataset.shuffle(WINDOW_SHARDS * SHARD_SAMPLES).decode().to_tuple("moments.npy", "cls").batched(BATCH)
    return lambda epoch: (len(torch.as_tensor(moments)) for moments, _ in iter(dataset))  # pyright: ignore


class FileDataset(torch.utils.data.Dataset):
    """One .npy file a sample."""

    def __init__(self, directory: Path) -> None:
        self._paths = sorted((directory / "files").iterdir())

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(np.load(self._paths[index])), index % 1000


def files(directory: Path, samples: int) -> Callable[[int], Iterable[int]]:
    """A torch DataLoader with a full shuffle."""
    loader = torch.utils.data.DataLoader(FileDataset(directory), batch_size=BATCH, shuffle=True)
    return lambda epoch: (len(moments) for moments, _ in loader)


def measure_epochs(case: str, directory: Path, samples: int) -> dict[str, float]:
    """Samples per second and CPU time of a cold and a warm epoch."""
    torch.set_num_threads(1)
    drop_from_page_cache(directory)
    figures: dict[str, float] = {}
    epoch_of: Callable[[int], Iterable[int]] | None = None
    for epoch, name in enumerate(("cold", "warm")):
        began, cpu = time.perf_counter(), time.process_time()
        epoch_of = epoch_of or {"ours": ours, "webdataset": webdataset, "files": files}[case](directory, samples)
        read = sum(epoch_of(epoch))
        assert read == samples
        figures[f"{name}_samples_per_s"] = samples / (time.perf_counter() - began)
        figures[f"{name}_cpu_us_per_sample"] = (time.process_time() - cpu) / samples * 1e6
    return figures


def measure_resume(case: str, directory: Path, samples: int, share: float) -> dict[str, float]:
    """Seconds from nothing to the first batch at ``share`` of the epoch; stock webdataset must read what it skips."""
    torch.set_num_threads(1)
    step = int(samples * share) // BATCH
    if case == "webdataset":
        from webdataset import compat as _  # importing is not resuming
    began = time.perf_counter()
    if case == "ours":
        reader = ShardReader(directory)
        order = SampleOrder(reader.shard_sizes, seed=0, window_shards=WINDOW_SHARDS)
        batches = Loader(reader, order, global_batch=BATCH, rank=0, world=1).batches(step, samples // BATCH)
        next(batches)
        seconds = time.perf_counter() - began
        batches.close()  # pyright: ignore[reportAttributeAccessIssue]
    else:
        batches = iter(webdataset(directory, samples)(0))
        for _ in range(step + 1):
            next(batches)
        seconds = time.perf_counter() - began
    return {"resume_s": seconds}


def measure_index(directory: Path) -> dict[str, float]:
    """Peak memory of a process that has opened a data set, read batches all over it, and touched its whole index."""
    reader = ShardReader(directory, verify_checksums=False)
    order = SampleOrder(reader.shard_sizes, seed=0, window_shards=WINDOW_SHARDS)
    samples = order.num_samples
    loader = Loader(reader, order, global_batch=BATCH, rank=0, world=1, workers=0)
    began = time.perf_counter()
    loader.batch(0)
    first_s = time.perf_counter() - began
    began = time.perf_counter()
    loader.batch(int(samples * 0.9) // BATCH)
    far_s = time.perf_counter() - began
    for start in range(0, samples, 100_000):
        assert reader._index["label"][start : start + 100_000].max() < 1000
    # Not ru_maxrss, which counts what the parent held when it started this process.
    (peak_kib,) = re.findall(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), flags=re.MULTILINE)
    peak = int(peak_kib) * 1024
    return {"samples": samples, "peak_bytes": peak, "first_batch_s": first_s, "batch_at_90_percent_s": far_s}


# --- the run ---


def in_a_process(*arguments: str) -> dict[str, float]:
    """The figures of one measurement in a fresh process."""
    root = Path(__file__).parent.parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, __file__, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """The median of each figure."""
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def compare(directory: Path, samples: int, repeats: int) -> dict[str, Any]:
    """All figures; the cases take turns, so that a busy minute meets all of them."""
    write_data(directory, samples)
    epochs: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
    resumes: dict[str, list[dict[str, float]]] = {}
    for _ in range(repeats):
        for case in CASES:
            epochs[case].append(in_a_process("--epochs", case, str(directory), str(samples)))
        for case in ("ours", "webdataset"):
            for share in ("0", "0.9"):
                run = in_a_process("--resume", case, str(directory), str(samples), share)
                resumes.setdefault(f"{case} at {share}", []).append(run)
    by_case = {case: medians(runs) for case, runs in epochs.items()}
    ratios = {}
    for temperature in ("cold", "warm"):
        for case in ("webdataset", "files"):
            cpu = f"{temperature}_cpu_us_per_sample"
            pairs = [other[cpu] / own[cpu] for own, other in zip(epochs["ours"], epochs[case], strict=True)]
            ratios[f"{temperature}, samples per CPU second, ours / {case}"] = statistics.median(pairs)
            speed = f"{temperature}_samples_per_s"
            pairs = [own[speed] / other[speed] for own, other in zip(epochs["ours"], epochs[case], strict=True)]
            ratios[f"{temperature}, samples per second, ours / {case}"] = statistics.median(pairs)
    pairs = [
        far["resume_s"] / near["resume_s"]
        for near, far in zip(resumes["ours at 0"], resumes["ours at 0.9"], strict=True)
    ]
    ratios["time to resume, ours, at 90% / at 0"] = statistics.median(pairs)
    return {
        "epochs": by_case,
        "resume": {name: medians(runs) for name, runs in resumes.items()},
        "ratios": ratios,
        "runs": {"epochs": epochs, "resume": resumes},
    }


def index_memory() -> dict[str, Any]:
    """Peak memory by the number of samples in the index, and what each costs beyond a data set of two windows."""
    base_samples = 2 * WINDOW_SHARDS * 1000
    found = {}
    for samples in (base_samples, 100_000, 10_000_000):
        with tempfile.TemporaryDirectory() as directory:
            write_sparse_data(Path(directory), samples)
            found[samples] = in_a_process("--index", directory)
    base = found.pop(base_samples)["peak_bytes"]
    per_sample = {samples: (run["peak_bytes"] - base) / (samples - base_samples) for samples, run in found.items()}
    return {"base_bytes": base, "runs": found, "bytes_per_sample": per_sample}


def cpu_name() -> str:
    """The processor as the kernel names it."""
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    return names[0] if names else platform.machine()


def commit() -> str:
    """The commit that was measured, with a mark if files differed from it."""
    root = Path(__file__).parent.parent
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=root, capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"


def table(result: dict[str, Any]) -> Iterator[str]:
    """The figures as lines of text."""
    yield f"{'':12} {'cold':>12} {'':>14} {'warm':>12}"
    yield f"{'':12} {'samples/s':>12} {'CPU us/sample':>14} {'samples/s':>12} {'CPU us/sample':>14}"
    for case, run in result["epochs"].items():
        yield (
            f"{case:12} {run['cold_samples_per_s']:12,.0f} {run['cold_cpu_us_per_sample']:14.1f} "
            f"{run['warm_samples_per_s']:12,.0f} {run['warm_cpu_us_per_sample']:14.1f}"
        )
    for name, run in result["resume"].items():
        yield f"first batch, {name:20} {run['resume_s'] * 1e3:10.1f} ms"
    for name, ratio in result["ratios"].items():
        yield f"{name:60} {ratio:8.2f}"
    for samples, run in result["index"]["runs"].items():
        yield f"peak memory with {samples:>10,} samples in the index {run['peak_bytes'] / 2**20:8.1f} MiB"
    for samples, size in result["index"]["bytes_per_sample"].items():
        yield f"index memory with {samples:>10,} samples {size:8.1f} bytes a sample"


def main() -> None:
    """Measure, print the table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8192, help="a multiple of the batch, 256")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--directory", help="where the data is written for the time of the run; needs 400 MB")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        result = compare(Path(directory), options.samples, options.repeats)
    result["index"] = index_memory()
    now = datetime.now(UTC)
    record = {
        "command": " ".join(["python", "benchmarks/bench_loader.py", *sys.argv[1:]]),
        "date": now.isoformat(timespec="seconds"),
        "commit": commit(),
        "hardware": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
            "load": os.getloadavg(),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "numpy", "webdataset")},
        },
        "samples": options.samples,
        "repeats": options.repeats,
        **result,
    }
    slug = re.sub(r"[^a-z0-9]+", "-", cpu_name().lower()).strip("-")
    path = Path(__file__).parent / "results" / f"loader_{slug}_{now:%Y-%m-%d}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print("\n".join([*table(result), f"written to {path}"]))


MEASUREMENTS: dict[str, Callable[..., dict[str, float]]] = {
    "--epochs": lambda case, directory, samples: measure_epochs(case, Path(directory), int(samples)),
    "--resume": lambda case, directory, samples, share: measure_resume(
        case, Path(directory), int(samples), float(share)
    ),
    "--index": lambda directory: measure_index(Path(directory)),
}

if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in MEASUREMENTS:
        print(json.dumps(MEASUREMENTS[sys.argv[1]](*sys.argv[2:])))
    else:
        main()
