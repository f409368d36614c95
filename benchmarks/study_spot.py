"""How often to save on machines that are taken away: a simulated week on 1,024 spot GPUs, against Young and Daly.

python -m benchmarks.study_spot            # benchmarks/results/spot_simulated.json and docs/images/spot_goodput.png

Discrete events, seeded, plain Python. Times to restart and to save are the measured ones of benchmarks/results
(chaos.json, save_*.json: two ranks on two CPU cores), lives of machines and the time to get another are assumed.

``fixed``: the run has its number of workers or stands still; a lost machine is replaced within the restart. The closed
forms are of this. ``week``: an elastic run on 128 nodes goes on with those that are left, and every node that
joins costs a restart.
"""

import argparse
import heapq
import json
import math
import random
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eqm_dist.planner.plan import daly, goodput, young

RESULTS = Path(__file__).parent / "results"
IMAGE = Path(__file__).parent.parent / "docs" / "images" / "spot_goodput.png"
WEEK_S = 7 * 86400.0
NODES = 128
NODE_HOURS = 24.0 * 7
"""Mean life of a spot node. Assumed: clouds publish no such time for machines of eight GPUs."""
REPLACEMENT_S = 900.0
"""From the loss of a node until another has joined. Assumed."""
CHECK_S = 600.0
"""launch.resize_check_s of the run: how often it looks for nodes that have joined."""
SEEDS = range(5)
INTERVALS = tuple(round(10 * 10 ** (step / 6)) for step in range(16))
"""Seconds between saves: 10 s to 53 minutes."""


def measured() -> dict[str, float]:
    """Seconds, as the records of the lab and of bench_save have them."""
    chaos = json.loads((RESULTS / "chaos.json").read_text())["scenarios"]
    (path,) = RESULTS.glob("save_*.json")
    saves = json.loads(path.read_text())["cases"]["zero2"]["medians"]
    return {
        "restart_s": statistics.median(chaos["kill_host"]["seconds_to_next_step"]),
        "join_s": chaos["join"]["longest_pause_s"],
        "stall_s": saves["ours"]["stall_s"],
        "save_s": saves["copy alone"]["whole_s"],
        "blocking_s": saves["torch.save"]["stall_s"],
    }


def fixed(
    interval_s: float, stall_s: float, save_s: float, restart_s: float, between_s: float, until_s: float, seed: int
) -> float:
    """The part of ``until_s`` that went into steps that count, with failures at random times."""
    chance = random.Random(seed)  # noqa: S311
    segment = max(interval_s + stall_s, save_s)
    now = useful = 0.0
    while now < until_s:
        stretch = chance.expovariate(1 / between_s)
        useful += max(0, math.floor((stretch - save_s) / segment)) * interval_s
        now += stretch
        # The restart begins anew when a failure comes in it.
        while (again := chance.expovariate(1 / between_s)) < restart_s:
            now += again
        now += restart_s
    return useful / now


@dataclass(frozen=True)
class Week:
    """What became of a week: parts of the node-seconds that all nodes together could have given."""

    goodput: float
    losses: int
    joins: int
    without_nodes: float


def week(
    interval_s: float, node_hours: float, seed: int, noticed: float = 0.0, times: dict[str, float] | None = None
) -> Week:
    """An elastic run over a week; its steps are as fast as it has nodes.

    Args:
        interval_s: seconds between saves.
        node_hours: mean life of a node.
        seed: of all chance.
        noticed: part of the losses that a notice precedes: the run saves in time, and loses no step.
        times: to restart and to save; by default those that were measured.
    """
    t = times or measured()
    chance = random.Random(seed)  # noqa: S311
    events: list[tuple[float, int, str]] = []
    number = 0

    def at(time: float, what: str) -> None:
        nonlocal number
        number += 1
        heapq.heappush(events, (time, number, what))

    def life() -> float:
        return chance.expovariate(1 / (node_hours * 3600))

    for _ in range(NODES):
        at(life(), "loss")
    at(CHECK_S, "check")
    nodes, waiting, losses, joins = NODES, 0, 0, 0
    segment = max(interval_s + t["stall_s"], t["save_s"])
    now = useful = missing = 0.0
    running_since = 0.0  # when the steps of this attempt begin; saves follow each other from there

    def whole(until: float, saved: bool) -> float:
        """Seconds of steps of this attempt that a restart at ``until`` finds whole."""
        done = max(0.0, until - running_since)
        if saved:
            return done * interval_s / segment
        return max(0, math.floor((done - t["save_s"]) / segment)) * interval_s

    while events:
        time, _, what = heapq.heappop(events)
        time = min(time, WEEK_S)
        missing += (time - now) * (NODES - nodes)
        now = time
        if now >= WEEK_S:
            break
        if what == "loss":
            losses += 1
            useful += whole(now, chance.random() < noticed) * nodes
            nodes -= 1
            running_since = now + t["restart_s"]
            at(now + REPLACEMENT_S, "ready")
        elif what == "ready":
            waiting += 1
            at(now + life(), "loss of a ready one")
        elif what == "loss of a ready one":
            if waiting:  # it may be gone before the run has taken it in
                waiting -= 1
                at(now + REPLACEMENT_S, "ready")
            else:
                at(now, "loss")
        else:
            if waiting:
                joins += waiting
                useful += whole(now, False) * nodes
                nodes += waiting
                waiting = 0
                running_since = now + t["join_s"]
            at(now + CHECK_S, "check")
    useful += whole(WEEK_S, True) * nodes
    total = WEEK_S * NODES
    return Week(useful / total, losses, joins, missing / total)


def study() -> dict[str, Any]:
    """Goodput by interval, of both simulations and the closed form, and the best intervals."""
    t = measured()
    between = NODE_HOURS * 3600 / NODES
    rows: list[dict[str, Any]] = []
    for interval in INTERVALS:
        ours, blocking = (t["stall_s"], t["save_s"]), (t["blocking_s"], 0.0)
        weeks = [week(interval, NODE_HOURS, seed, times=t) for seed in SEEDS]
        told = [week(interval, NODE_HOURS, seed, noticed=0.9, times=t) for seed in SEEDS]
        rows.append(
            {
                "interval_s": interval,
                "background": goodput(interval, *ours, t["restart_s"], between),
                "background_simulated": [
                    fixed(interval, *ours, t["restart_s"], between, WEEK_S, seed) for seed in SEEDS
                ],
                "blocking": goodput(interval, *blocking, t["restart_s"], between),
                "blocking_simulated": [
                    fixed(interval, *blocking, t["restart_s"], between, WEEK_S, seed) for seed in SEEDS
                ],
                "elastic": [asdict(each) for each in weeks],
                "elastic_noticed": [each.goodput for each in told],
            }
        )
    return {
        "what": "simulated: a week on 1,024 spot GPUs, goodput by save interval",
        "command": "python -m benchmarks.study_spot",
        "measured": t,
        "assumed": {
            "node_hours": NODE_HOURS, "replacement_s": REPLACEMENT_S, "resize_check_s": CHECK_S, "noticed": 0.9,
        },
        "seconds_between_failures": between,
        "best": {
            "young_background_s": young(t["stall_s"], between), "daly_background_s": daly(t["stall_s"], between),
            "young_blocking_s": young(t["blocking_s"], between), "daly_blocking_s": daly(t["blocking_s"], between),
            "simulated_background_s": _best(rows, "background_simulated"),
            "simulated_blocking_s": _best(rows, "blocking_simulated"),
        },
        "rows": rows,
    }  # fmt: skip


def _best(rows: list[dict[str, Any]], what: str) -> float:
    return max(rows, key=lambda row: statistics.mean(row[what]))["interval_s"]


def draw(record: dict[str, Any], path: Path) -> None:
    """Goodput against the interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    rows, best = record["rows"], record["best"]
    x = [row["interval_s"] for row in rows]
    for what, label, color in (
        ("background", "saves in the background", "C0"),
        ("blocking", "torch.save, which blocks", "C1"),
    ):
        axes.plot(x, [row[what] for row in rows], color=color, label=f"{label}: closed form")
        axes.plot(x, [statistics.mean(row[f"{what}_simulated"]) for row in rows], "o", color=color, ms=4,
                  label=f"{label}: simulated")  # fmt: skip
    elastic = [statistics.mean(week["goodput"] for week in row["elastic"]) for row in rows]
    axes.plot(x, elastic, "s--", color="C2", ms=4, label="elastic run, background: simulated")
    axes.plot(x, [statistics.mean(row["elastic_noticed"]) for row in rows], "^--", color="C4", ms=4,
              label="the same, 9 of 10 losses with a notice")  # fmt: skip
    axes.axvline(best["young_blocking_s"], color="C1", lw=1, ls=":")
    axes.annotate("Young", (best["young_blocking_s"], 0.52), color="C1", rotation=90, ha="right")
    axes.set(xscale="log", xlabel="seconds between saves", ylabel="goodput", ylim=(0.5, 1.0))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower left")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Simulate, write the record, draw, and print the best intervals."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    record = study()
    (RESULTS / "spot_simulated.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(record, IMAGE)
    for name, seconds in record["best"].items():
        print(f"{name}: {seconds:.0f}")
    for row in record["rows"]:
        elastic = statistics.mean(each["goodput"] for each in row["elastic"])
        print(f"{row['interval_s']:>6} s  {row['background']:.3f} {statistics.mean(row['background_simulated']):.3f}"
              f"  {row['blocking']:.3f} {statistics.mean(row['blocking_simulated']):.3f}"
              f"  elastic {elastic:.3f} {statistics.mean(row['elastic_noticed']):.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
