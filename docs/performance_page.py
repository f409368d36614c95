"""Write docs/performance.md from the records of benchmarks/results: ``python docs/performance_page.py``."""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("performance.md")
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
HEAD = """# Performance: what was counted, what was measured

`python docs/performance_page.py` makes this page from the records in [`benchmarks/results/`](../benchmarks/results/),
which name command, hardware and commit.
{gpu}
```
make gpu                               # on a machine with one GPU and torch: ten minutes, all of the below
make gpu-cluster                       # what needs DeepSpeed and Ray as well
python -m benchmarks.bench_step        # a training step: engines, precision, compiled or not; --official PATH compares
python -m benchmarks.bench_sampler     # images and evaluations a second, adaptive against fixed
python -m benchmarks.bench_startup     # to the first step, and what Ray adds
python -m benchmarks.bench_scaling     # one rank and two
```

## Counted
"""
NO_GPU = "\n**Nothing here was timed on a GPU.** No machine with one was at hand when it was written.\n"
WIRE = """
### Bytes that a step sends

On two gloo ranks, held by `tests/test_wire.py`. Bytes of each trained parameter, whatever the size of the batch:

| engine | one micro-batch | two micro-batches |
|---|---|---|
| plain, ZeRO 0 | 4.0 | 4.0 |
| ZeRO 1, the default | 8.0 | 8.0 |
| ZeRO 2 | 8.0 | 12.0 |
| ZeRO 3 | 8.03 | 12.03 |

A step of DeepSpeed's never makes the host wait for the device; with its throughput timer it did so twice a
micro-batch. All blocks share one compiled graph for each of at most two sizes of a micro-batch, and the draws of a
batch are at most 20 kernels with the bits of the eager ones (`tests/test_compiled.py`).

## Measured
"""
Cells = Iterable[Iterable[str]]


def newest(what: str) -> list[dict[str, Any]]:
    """The newest record of a benchmark on each device."""
    files = sorted(RESULTS.glob(f"{what}_*.json"))
    return list({path.stem.rpartition("_")[0]: json.loads(path.read_text()) for path in files}.values())


def page() -> str:
    """The page."""
    on_gpu = any(record["hardware"].get("gpus") for record in newest("step"))
    parts = [HEAD.format(gpu="" if on_gpu else NO_GPU), *map(_counts, newest("counts")), WIRE]
    kinds = {"step": _step, "sampler": _sampler, "scaling": _scaling, "startup": _startup}
    parts += [table(record) for what, table in kinds.items() for record in newest(what)]
    return "\n".join(parts).rstrip() + "\n"


def _counts(record: dict[str, Any]) -> str:
    rows = [
        (
            f"{row['size']}/2 x{row['batch']}",
            f"{row['block']['forward_kernels']} + {row['block']['backward_kernels']}",
            f"{row['block']['forward_elementwise_mb']:,} + {row['block']['backward_elementwise_mb']:,} MB",
            f"{row['blocks']}",
            f"{row['draws_kernels_eager']}",
            f"{row['gflop_per_image']:,} GFLOP",
        )
        for row in record["counted"]
    ]
    what = "on tensors without values; the bytes are those of elementwise kernels, forward + backward"
    return f"### A block, eager, in bf16 autocast\n\n`{record['command']}`: {what}.\n\n" + _table(
        "model, batch|kernels|bytes|blocks|kernels of the draws|an image, training", rows
    )


def _step(record: dict[str, Any]) -> str:
    rows = [
        (
            name,
            f"{1e3 * row['step_s']:,.0f}",
            f"{row['images_per_s']:,.2f}",
            f"{row['mfu']:.1%}" if row["mfu"] else "",
            f"{row['peak_bytes'] / 2**30:.1f} GiB" if row["peak_bytes"] else "",
        )
        for name, row in record["steps"].items()
    ]
    return _measured("A training step", record, "case|ms|images/s|MFU|peak memory", rows)


def _sampler(record: dict[str, Any]) -> str:
    rows = [
        (name, f"{row['images_per_s']:,.2f}", f"{row['evaluations_per_s']:,.1f}", f"{row['nfe']:.1f}")
        for name, row in record["samplers"].items()
    ]
    return _measured("A sampler", record, "case|images/s|evaluations/s|NFE", rows)


def _scaling(record: dict[str, Any]) -> str:
    rows = [
        (name, f"{speed:,.2f}", f"{record['efficiency'][name]:.2f}") for name, speed in record["images_per_s"].items()
    ]
    return _measured("Ranks", record, "engine, ranks|images/s|a rank, of that with one", rows)


def _startup(record: dict[str, Any]) -> str:
    rows = [
        (
            name,
            f"{row['to_step_10_s']:.1f} s",
            f"{row['after_last_step_s']:.1f} s",
            f"{row['whole_s']:.1f} s",
            f"{row['step_of_plain']:.2f}",
        )
        for name, row in record["medians"].items()
    ]
    return _measured(
        "Start and end of a run", record, "way|to step 10|after the last step|whole|a step, of plain", rows
    )


def _measured(title: str, record: dict[str, Any], head: str, rows: Cells) -> str:
    hardware = record["hardware"]
    load = hardware.get("load", [0])[0]
    busy = f"; load {load:.0f} in the end, so other work shared the machine" if load > hardware["cores"] + 1 else ""
    where = f"`{record['command']}`, {hardware.get('device', 'CPU')}, {hardware['cores']} cores{busy}."
    return f"### {title}\n\n{where}\n\n{_table(head, rows)}"


def _table(head: str, rows: Cells) -> str:
    names = head.split("|")
    lines = [names, ["---"] * len(names), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main() -> None:
    """Write the page."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
