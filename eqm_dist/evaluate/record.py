"""Figures as records: one JSON object for each, with everything needed to compare it with another."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eqm_dist.documents import to_json
from eqm_dist.evaluate.statistics import metric_of
from eqm_dist.metric_settings import MetricSettings
from eqm_dist.storage.files import storage_errors


def records_of(
    figures: Mapping[str, float], settings: MetricSettings, circumstances: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """One record for each metric: ``metric``, ``value``, ``std`` where there is one, ``settings``, and the
    circumstances, which are the same for all: samples, labels, reference, extractor, sampler, NFE, seed, versions.
    """
    chosen = asdict(settings)
    records = []
    for metric, value in figures.items():
        if metric.endswith("_std"):
            continue
        spread = {"std": figures[f"{metric}_std"]} if f"{metric}_std" in figures else {}
        own = {name: chosen[name] for name in metric_of(metric).settings}
        records.append({"metric": metric, "value": value, **spread, "settings": own, **circumstances})
    return records


def append_records(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Append one line of JSON for each record.

    Raises:
        StorageError: the file cannot be written.
    """
    lines = "".join(to_json(record) + "\n" for record in records)
    with storage_errors("append to", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(lines)


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """The figures as aligned lines, and below them what they were measured with."""
    first = records[0]
    lines = []
    for record in records:
        spread = f" +- {record['std']:.3g}" if "std" in record else ""
        own = ", ".join(f"{name} {value}" for name, value in record["settings"].items())
        figure = f"{record['value']:.6g}{spread}"
        lines.append(f"  {record['metric']:<10} {figure:<22} {own}".rstrip())
    circumstances = {"images": f"{first['samples']:,} of {first['images']}"}
    if first["reference"] is not None:
        count = first["reference_samples"]
        circumstances["reference"] = first["reference"] if count is None else f"{count:,} of {first['reference']}"
    circumstances["extractor"] = first["extractor"]
    return "\n".join([*lines, *(f"  {name:<10} {text}" for name, text in circumstances.items())])
