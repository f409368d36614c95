"""Train on the lab, break something, and compare with the run to which nothing happened.

python -m cluster.lab.chaos                      every scenario; about an hour
python -m cluster.lab.chaos kill_rank cut        some of them
python -m cluster.lab.chaos --table              the table of docs/chaos.md, from the results so far

A lab that is up is used and left; otherwise one is built, and removed in the end. See docs/chaos.md.
"""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from cluster.lab import faults, lab, layout, network
from cluster.lab.scenarios import SCENARIOS, Scenario, Trouble
from cluster.lab.table import render
from cluster.lab.watched_run import REPOSITORY, Seen, WatchedRun
from eqm_dist import cli
from eqm_dist.errors import EqmDistError, LaunchError
from eqm_dist.run_directory import CHECKPOINTS, step_name

RESULTS = REPOSITORY / "benchmarks" / "results" / "chaos.json"
SOON = 100
TOLERANCES = {"losses soon after": 1e-5, "losses": 1e-2}
"""Largest relative differences where the number of workers changed: the same numbers are then added in another order,
which changes a loss by 1e-7, and training makes that grow over a thousand steps. A state that is not what was saved
would show at once."""
FLAGS: Mapping[str, Any] = {
    "train.global_batch": 16,
    "train.log_every": 1,
    "model.hidden_size": 32,
    "model.depth": 2,
    "model.num_heads": 2,
    "optimizer.learning_rate": 5e-4,
    "optimizer.schedule": "constant",  # so that a shorter run is the beginning of a longer one
    "checkpoint.every": 20,
    "evaluation.every": 0,
    "launch.cpus_per_worker": 1,
    "track.mlflow_uri": f"http://{layout.HEAD}:{layout.MLFLOW_PORT}",
}


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        EqmDistError: one sentence for the user.
    """
    parser = cli.command_parser(__doc__, prog="python -m cluster.lab.chaos")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SCENARIOS)} (default: all)")
    parser.add_argument("--table", action="store_true", help="print the table, run nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE", help="results (default: %(default)s)")
    parsed = parser.parse_args(arguments)
    if unknown := [name for name in parsed.names if name not in SCENARIOS]:
        raise lab.LabError(f"{unknown[0]} is not a scenario; choose from {', '.join(SCENARIOS)}.")
    if not parsed.table:
        run_scenarios(parsed.names or list(SCENARIOS), parsed.out)
    print(render(json.loads(parsed.out.read_bytes())))


def run_scenarios(names: Sequence[str], out: Path) -> None:
    """Run scenarios on a lab and enter each outcome into the results, as soon as it is there.

    Raises:
        LaunchError: some did not end as they must; the results say how.
    """
    found = bool(network.connected())
    try:
        if not found:
            lab.up(SCENARIOS[names[0]].workers + 1)
        reference = uninterrupted(max(SCENARIOS[name].steps for name in names))
        failed = []
        for name in names:
            print(f"{datetime.now():%H:%M:%S} {name}: {SCENARIOS[name].text}", flush=True)
            outcome = play(name, SCENARIOS[name], reference)
            print(f"         {_summary(outcome)}", flush=True)
            _enter(out, name, outcome)
            failed += [name] * bool(outcome["problems"])
    finally:
        if not found:
            lab.down()
    if failed:
        raise LaunchError(f"{len(failed)} of {len(names)} scenarios did not end as they must: {', '.join(failed)}.")


def uninterrupted(steps: int) -> WatchedRun:
    """The run on two workers to which nothing happens; one that was made on this lab is not made again."""
    _whole_lab(2, rate_mbit=None)
    run = WatchedRun(
        f"uninterrupted-{steps}", {**FLAGS, "train.steps": steps, "launch.workers": 2, "checkpoint.keep": 1000}
    )
    run.submit()
    try:
        if run.wait():
            raise LaunchError(f"The uninterrupted run did not end well; see {run.output}.")
    finally:
        run.close()
    return run


def play(name: str, scenario: Scenario, reference: WatchedRun) -> dict[str, Any]:
    """One scenario on a whole lab; what came of it."""
    _whole_lab(scenario.workers, scenario.rate_mbit)
    run = WatchedRun(f"{name}-{datetime.now():%H%M%S}", {**FLAGS, "train.steps": scenario.steps, **scenario.flags})
    trouble, submitted, problems = Trouble(run), time.monotonic(), []
    run.submit()
    try:
        scenario.play(trouble)
        if code := run.wait():
            problems.append(f"exit code {code}")
    except EqmDistError as error:
        problems.append(str(error))
    finally:
        run.close()
    if not trouble.times:
        raise LaunchError(f"{name} had nothing to strike: {problems[0]}")
    apart = loss_differences(run.losses(), reference.losses(), scenario.steps)
    if scenario.same_workers:
        apart["ema"] = ema_difference(run.directory, reference.directory, scenario.steps)
    for what, by in apart.items():
        allowed = 0.0 if scenario.same_workers else TOLERANCES[what]
        if by is None:
            problems.append(f"{what}: not all there")
        elif by > allowed:
            problems.append(f"{what} differ by {by:.1g}, and may by {allowed:.1g}")
    record = _mlflow(run.name)
    if record != {"runs": 1, "steps": scenario.steps, "repeats": 0}:
        problems.append(f"MLflow has {record}")
    return {
        "what": scenario.text,
        "steps": scenario.steps,
        "network_mbit": scenario.rate_mbit,
        "flags": dict(scenario.flags),
        **times(run.seen, submitted, trouble.times),
        "counters": run.counters(),
        "difference": apart,
        "mlflow": record,
        "told": run.told(),
        "problems": problems,
    }


def _whole_lab(workers: int, rate_mbit: float | None) -> None:
    """Undo what earlier scenarios did: all hosts on and connected, none too many, disks free, S3 well."""
    faults.mend_s3()
    faults.free_disk(None)
    wanted = [layout.HEAD, *(layout.worker(number + 1) for number in range(workers))]
    for host in network.connected():
        if host not in wanted:
            lab.remove_host(host)
    for host in wanted:
        if host not in network.connected() or not lab.init_pid(host):
            faults.start_host(host)
        network.plug(host)
        faults.free_disk(host)
        if host != layout.HEAD:
            network.shape(host, rate_mbit)
    lab.wait_until(lambda: lab.ray_hosts() == wanted, "Ray to see all hosts")


def times(seen: Sequence[Seen], submitted: float, faults_at: Sequence[float]) -> dict[str, Any]:
    """When the next step came after each fault, what was done again, and how much time went into steps that count."""
    attempts = [list(looks) for _, looks in groupby(seen, key=lambda look: look.attempt)]
    # Where an attempt begins, the file holds the steps up to the checkpoint from which it goes on.
    lost = sum(before[-1].step - after[0].step for before, after in pairwise(attempts))
    pauses = [later.time - look.time for look, later in pairwise(seen) if later.time > faults_at[0]]
    step_s = statistics.median(
        (later.time - look.time) / (later.step - look.step)
        for looks in attempts
        for look, later in pairwise(looks)
        if later.step > look.step
    )
    wall_s = seen[-1].time - submitted
    return {
        "seconds_to_next_step": [round(_recovered(attempts, fault) - fault, 1) for fault in faults_at],
        "longest_pause_s": round(max(pauses), 1),
        "restarts": len(attempts) - 1,
        "steps_lost": lost,
        "wall_s": round(wall_s, 1),
        "goodput": round(seen[-1].step * step_s / wall_s, 3),
    }


def _recovered(attempts: Sequence[Sequence[Seen]], fault: float) -> float:
    """When the first step after a fault was made: in the attempt after the one that it struck, if there is one."""
    for after in attempts[1:]:
        if after[0].time > fault and len(after) > 1:
            return after[1].time
    return next((look.time for look in attempts[-1] if look.time > fault), fault)


def loss_differences(
    losses: Mapping[int, float], reference: Mapping[int, float], steps: int
) -> dict[str, float | None]:
    """Largest relative difference of a loss: soon after the first one, and in all; None if a step is missing."""
    if list(losses) != list(range(1, steps + 1)):
        return {"losses soon after": None, "losses": None}
    by = [abs(losses[step] - reference[step]) / reference[step] for step in losses]
    first = next((index for index, difference in enumerate(by) if difference), 0)
    return {"losses soon after": max(by[first : first + SOON]), "losses": max(by)}


def ema_difference(directory: Path, reference: Path, step: int) -> float | None:
    """Largest difference of an EMA weight after a step; None without a checkpoint."""
    from safetensors.numpy import load_file

    files = [place / CHECKPOINTS / step_name(step) / "ema.safetensors" for place in (directory, reference)]
    if not all(file.exists() for file in files):
        return None
    weights, expected = map(load_file, files)
    return max(float(abs(weights[name] - expected[name]).max()) for name in expected)


def _mlflow(name: str) -> dict[str, int]:
    """How many runs of the name MLflow has, and how many steps, and steps that are there more than once."""
    from mlflow import MlflowClient

    client = MlflowClient(layout.MLFLOW)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, f"attributes.run_name = '{name}'")
    points = [point.step for run in runs for point in client.get_metric_history(run.info.run_id, "train/loss")]
    return {"runs": len(runs), "steps": len(set(points)), "repeats": len(points) - len(set(points))}


def _summary(outcome: Mapping[str, Any]) -> str:
    found = "; ".join(outcome["problems"]) or "as it must be"
    return (
        f"{found} | next step after {outcome['seconds_to_next_step']} s, longest pause {outcome['longest_pause_s']} s,"
        f" {outcome['restarts']} restarts, {outcome['steps_lost']} steps again, goodput {outcome['goodput']},"
        f" differences {outcome['difference']}"
        + "".join(f"\n         {line}" for line in outcome["told"] if outcome["problems"])
    )


def _enter(out: Path, name: str, outcome: Mapping[str, Any]) -> None:
    from eqm_dist.provenance import provenance

    results = json.loads(out.read_bytes()) if out.exists() else {"scenarios": {}}
    made = provenance()
    entries = {**results["scenarios"], name: {**outcome, "commit": made["commit"]}}
    record = {
        "command": "python -m cluster.lab.chaos",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "hardware": made["hardware"],
        "versions": made["versions"],
        "ray_health_check": layout.RAY_HEALTH_CHECK,
        "flags": FLAGS,
        "scenarios": {key: entries[key] for key in SCENARIOS if key in entries},
    }
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    cli.run(main)
