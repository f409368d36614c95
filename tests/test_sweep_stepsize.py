"""``tuning/sweep_stepsize.py``: its figures are those of ``pipelines/evaluate.py``, and a kill costs nothing twice."""

import csv
import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from PIL import Image

from eqm_dist.commands.evaluate import main as evaluate
from eqm_dist.commands.sample import main as sample
from eqm_dist.commands.sweep_stepsize import main
from eqm_dist.core.samplers import NesterovGradientDescent
from eqm_dist.core.sampling import SamplingMethod
from eqm_dist.errors import ConfigError
from eqm_dist.evaluate.generate import generate, generate_along
from eqm_dist.sweeps.ledger import Ledger
from eqm_dist.sweeps.spaces import trial_name
from eqm_dist.sweeps.stepsize.results import Result, compared, pareto_front, ranked, survivors, table
from tests import commands, tiny

SCRIPT = Path(__file__).parent.parent / "tuning" / "sweep_stepsize.py"
EXTRACTOR = """
import torch

class Pixels(torch.nn.Module):
    id = "pixels of a sweep"
    num_features = 4
    def forward(self, images):
        return images.flatten(1)[:, :4].double() / 255
"""
SPACE = [
    {
        "sampler.name": "gd",
        "sampler.step_size": [0.02, 0.1],
        "sampler.nfe": [2, 5],
    },
    {
        "sampler.name": "nag",
        "sampler.momentum": [0.3, 0.6],
        "sampler.step_size": [0.02, 0.1],
        "sampler.nfe": [2, 5],
    },
]
TRIALS = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run, recorded in MLflow, and an extractor of its images."""
    root = tmp_path_factory.mktemp("stepsize")
    shards = tiny.write_blots(root / "data" / "blots")
    (root / "sweep_extractor.py").write_text(EXTRACTOR)
    sys.path.insert(0, str(root))
    options: dict[str, Any] = {"optimizer.learning_rate": 0.05, "train.steps": 30, "checkpoint.every": 30,
                               "train.log_every": 30, "evaluation.extractor": "sweep_extractor:Pixels",
                               "track.mlflow": True}  # fmt: skip
    outcome = tiny.train(*tiny.flags(tiny.overrides(root, shards, **options)))
    assert outcome.code == 0, outcome.err
    return root / "tiny"


def flags(run: Path, out: Path, space: object = SPACE, **others: object) -> list[str]:
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(space))
    values = {"model": run, "run.root": run.parent, "out": out, "space": file, "launcher": "local",
              "rungs": "16,32", "samples": 48, "reduction": 4, "finalists": 1, "track.mlflow": "false",
              "cache": run.parent / "cache", **others}  # fmt: skip
    return [part for key, value in values.items() for part in (f"--{key}", str(value))]


def results(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_points_of_one_descent_are_those_of_descents_of_their_own() -> None:
    sampler = NesterovGradientDescent(step_size=0.1, momentum=0.5)
    common = {"indices": torch.arange(7), "labels": torch.arange(7) % 3, "latent_shape": (1, 4, 4), "seed": 3,
              "decode": lambda latents: latents.permute(0, 2, 3, 1)}  # fmt: skip

    def field(x: torch.Tensor, labels: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return labels[:, None, None, None] - x.tanh()

    along = list(generate_along(field, sampler=sampler, nfe=(1, 4, 9), **common))
    for nfe, point in zip((1, 4, 9), along, strict=True):
        alone = generate(field, method=SamplingMethod(sampler, nfe), batch=7, **common)
        torch.testing.assert_close(point.images, alone.images, rtol=0, atol=0)
        assert point.nfe.tolist() == alone.nfe.tolist() == [nfe] * 7


def test_its_figures_are_those_of_evaluate_and_best_yaml_gives_them_again(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    main(flags(run, out))
    printed = capsys.readouterr().out
    found = results(out)
    assert sum(line["samples"] == 16 for line in found) == TRIALS
    assert 3 <= sum(line["samples"] == 32 for line in found) < TRIALS  # a quarter, and the Pareto front
    best = rows(out)[0]
    assert float(best["fid"]) == min(line["fid"] for line in found if line["samples"] == 48)
    assert "rank" in printed
    assert f"{float(best['fid']):.3f}" in printed

    evaluate(["--model", str(run), "--run.root", str(run.parent),
              "--config", str(out / "best.yaml"), "--samples", "48", "--launcher", "local",
              "--out", str(tmp_path / "records"), "--cache", "none", "--batch", "16"])  # fmt: skip
    record = json.loads((tmp_path / "records").read_text())
    # Statistics that were added rung by rung against those of one go: another order of float64 sums.
    assert record["value"] == pytest.approx(float(best["fid"]), rel=1e-6)
    assert record["sampler"] == yaml.safe_load((out / "best.yaml").read_text())["sampler"]
    sample(["--model", str(run), "--config", str(out / "best.yaml"), "--samples", "3", "--launcher", "local",
            "--out", str(tmp_path / "images")])  # fmt: skip
    trained = tiny.train("--config", str(out / "best.yaml"), "--dry-run")
    assert trained.code == 0, trained.err
    for picture in ("fid_step_size.png", "fid_nfe.png", "parallel.png"):
        with Image.open(out / picture) as image:
            assert len(image.convert("RGB").getcolors(1 << 24) or []) > 10  # something is drawn


def test_the_same_command_measures_nothing_twice(run: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    main(flags(run, whole))
    expected = {(line["samples"], json.dumps(line["overrides"])): line["fid"] for line in results(whole)}
    before = (whole / "results.jsonl").read_bytes()
    main(flags(run, whole))
    assert (whole / "results.jsonl").read_bytes() == before

    # As a kill leaves it: half a line, and in the middle of the second rung no statistics of a part of the trials.
    main(flags(run, cut, samples=32))
    lines = (cut / "results.jsonl").read_bytes().splitlines(keepends=True)
    (cut / "results.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
    main(flags(run, cut, samples=32))
    again = {(line["samples"], json.dumps(line["overrides"])): line["fid"] for line in results(cut)}
    assert len(again) == len(results(cut))
    for point, fid in again.items():
        assert fid == pytest.approx(expected[point], rel=1e-9)


def test_finalists_are_compared_with_seeds_that_did_not_choose_them(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    main(flags(run, out, finalists=3, seeds=2))
    first = results(out)
    compared = [line for line in first if line["seed"] is not None]
    best = [line["overrides"] for line in sorted((line for line in first if line["samples"] == 48 and not line["seed"]),
                                                 key=lambda line: line["fid"])][:3]  # fmt: skip
    assert [(line["seed"], line["samples"]) for line in compared] == [(1, 48)] * len(best) + [(2, 48)] * len(best)
    assert [sorted(map(str, best))] * 2 == [sorted(str(line["overrides"]) for line in compared if line["seed"] == seed)
                                            for seed in (1, 2)]  # fmt: skip
    capsys.readouterr()
    main(flags(run, out, finalists=3, seeds=3))  # one more: only that is measured
    assert results(out)[: len(first)] == first
    assert [line["seed"] for line in results(out)[len(first) :]] == [3] * len(best)

    printed = capsys.readouterr().out
    assert "The finalists, by seeds 1 to 3:" in printed
    winner, *others = rows(out)[: len(best)]
    fids = [line["fid"] for line in results(out) if line["seed"] and trial_name(line["overrides"]) == winner["trial"]]
    assert float(winner["fid_mean"]) == pytest.approx(statistics.fmean(fids))
    assert float(winner["fid_std"]) == pytest.approx(statistics.stdev(fids))
    assert f"FID {statistics.fmean(fids):.3f} +- {statistics.stdev(fids):.3f} over 3 seeds" in printed
    comment = (out / "best.yaml").read_text().splitlines()[0]
    assert comment.startswith(
        f"# FID {statistics.fmean(fids):.3f} +- {statistics.stdev(fids):.3f} over 3 seeds, with 48"
    )
    assert {one["verdict"] for one in (winner, *others)} <= {"lowest", "tied", "unclear", "worse"}
    assert sum(one["verdict"] == "lowest" for one in (winner, *others)) == 1
    with Image.open(out / "finalists.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 10

    evaluate(["--model", str(run), "--run.root", str(run.parent), "--config", str(out / "best.yaml"), "--samples", "48",
              "--launcher", "local", "--out", str(tmp_path / "records"), "--cache", "none", "--batch", "16",
              "--seed", "2"])  # fmt: skip
    assert json.loads((tmp_path / "records").read_text())["value"] == pytest.approx(fids[1], rel=1e-6)


def test_of_a_tie_the_sweep_takes_the_cheaper(run: Path, tmp_path: Path) -> None:
    """Two points of one descent whose FIDs the noise of the seeds orders now so, now so."""
    standings = compared(
        [
            *(Result({"sampler.nfe": nfe}, 48, fid, float(nfe), 1.0) for nfe, fid in ((40, 1.297), (20, 1.300))),
            *(
                Result({"sampler.nfe": nfe}, 48, fid, float(nfe), 1.0, None, seed)
                for seed, pair in ((1, (1.385, 1.399)), (2, (1.215, 1.209)), (3, (1.300, 1.301)))
                for nfe, fid in zip((40, 20), pair, strict=True)
            ),
            Result({"sampler.nfe": 10}, 48, 1.298, 10.0, 1.0),  # was not measured with all seeds
            Result({"sampler.nfe": 10}, 48, 0.1, 10.0, 1.0, None, 1),
        ],
        48,
        (1, 2, 3),
    )
    assert [one.point.overrides["sampler.nfe"] for one in standings] == [20, 40]
    assert standings[0].verdict == "tied"
    assert standings[1].lowest


def test_a_trial_that_fails_says_why_and_stops_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = {"sampler.name": "gd", "sampler.step_size": [0.02, 1e30],
             "sampler.nfe": [3]}  # fmt: skip
    main(flags(run, tmp_path / "sweep", space))
    assert "failed: step_size 1e+30: it diverges: 16 images of 16 are not finite numbers" in capsys.readouterr().out
    good, bad = rows(tmp_path / "sweep")
    assert good["failure"] == ""
    assert float(good["fid"]) > 0
    assert (bad["fid"], bad["samples"]) == ("", "16")


def test_a_sweep_whose_trials_all_fail_fails_and_says_why(run: Path, tmp_path: Path) -> None:
    space = {"sampler.name": "gd", "sampler.step_size": [1e30, 2e30], "sampler.nfe": [3]}
    for _ in range(2):
        ended = commands.run("sweep-stepsize", *flags(run, tmp_path / "sweep", space))
        assert ended.code == 1
        assert "is complete" not in ended.out
        error = ended.err.splitlines()[-1]  # lines of the log may stand above
        assert error.startswith("error: A sweep needs one trial that gives an FID, and none of 2 trials in")
        assert "step_size 1e+30, for this: it diverges: 16 images of 16" in error
        assert "results.csv has every reason" in error
        assert [row["failure"] for row in rows(tmp_path / "sweep")] == [
            "it diverges: 16 images of 16 are not finite numbers"
        ] * 2


def test_random_and_optuna_keep_to_their_budget_and_go_on(run: Path, tmp_path: Path) -> None:
    for search in ("random", "optuna"):
        out = tmp_path / search
        main(flags(run, out, search=search, trials=6, rungs="16", samples=32))
        first = results(out)
        assert sum(line["samples"] == 16 for line in first) == 6
        main(flags(run, out, search=search, trials=9, rungs="16", samples=32))  # more trials: the old ones stay
        assert results(out)[: len(first)] == first
        assert sum(line["samples"] == 16 for line in results(out)) == 9


def test_a_grid_may_get_more_points_and_no_others(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    space = {"sampler.name": "gd", "sampler.nfe": [2, 3]}
    main(flags(run, out, space))
    first = results(out)
    main(flags(run, out, {"sampler.name": ["gd"], "sampler.nfe": [4, 3, 2]}))
    assert results(out)[: len(first)] == first
    assert [line["overrides"]["sampler.nfe"] for line in results(out)[len(first) :] if line["samples"] == 16] == [4]
    with pytest.raises(ConfigError, match=r"space was .* when the sweep in .* began and is now"):
        main(flags(run, out, space))  # 4 would be in the table, and not in the space


def test_a_study_is_kept_for_optunas_own_tools(run: Path, tmp_path: Path) -> None:
    space = {"sampler.name": "gd", "sampler.step_size": {"log": [0.01, 0.1]}, "sampler.nfe": [2, 5]}
    out, name = tmp_path / "sweep", str(tmp_path / "sweep")
    common = {"search": "optuna", "rungs": "16", "samples": 32}
    for trials, storage in ((3, f"sqlite:///{tmp_path / 'study.db'}"), (5, f"sqlite:///{tmp_path / 'study.db'}"),
                            (5, str(tmp_path / "study.log"))):  # fmt: skip
        main(flags(run, out, space, trials=trials, storage=storage, **common))
        kept = optuna.load_study(study_name=name, storage=storage if "://" in storage else JournalStorage(
            JournalFileBackend(storage)))  # fmt: skip
        found = {(line["overrides"]["sampler.step_size"], line["overrides"]["sampler.nfe"]): [line["fid"], line["nfe"]]
                 for line in results(out) if line["samples"] == 16}  # fmt: skip
        assert len(found) == trials
        told = [trial for trial in kept.trials if trial.state == optuna.trial.TrialState.COMPLETE]
        assert {(trial.user_attrs["sampler.step_size"], trial.user_attrs["sampler.nfe"]): trial.values
                for trial in told} == found  # fmt: skip
        assert len(told) == trials  # an earlier attempt's study was made anew
        assert kept.user_attrs["objectives"] == ["FID", "NFE"]
    junk, foreign = tmp_path / "junk", f"sqlite:///{tmp_path / 'foreign.db'}"
    junk.write_bytes(b"\xff\x00 rubbish\n")
    optuna.create_study(study_name=name, storage=foreign)
    for storage, message in (
        (str(junk), "cannot be opened"),
        ("nosuchdatabase://x/y", "--storage must be a URL such as sqlite:///study.db"),
        (f"sqlite:///{tmp_path}/no/such/place.db", "cannot be opened"),
        (foreign, "must not hold a study of somebody else"),
    ):
        with pytest.raises(ConfigError, match=message):
            main(flags(run, tmp_path / "sweep", space, trials=6, storage=storage, **common))


def test_time_that_is_up_leaves_a_sweep_that_goes_on(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    main(flags(run, out, hours=1e-9))
    assert rows(out) == []
    main(flags(run, out))
    assert len(rows(out)) == TRIALS


def test_mlflow_has_a_parent_and_a_child_for_each_trial(run: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    out = tmp_path / "sweep"
    for _ in range(2):  # the second finds all of them
        main(flags(run, out, finalists=2, seeds=2, **{"track.mlflow": "true"}))
    client = MlflowClient(f"sqlite:///{run.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("eqm-dist-sweeps")
    assert experiment is not None
    parent = json.loads((out / "mlflow.json").read_text())["run_id"]
    nested = f"tags.`mlflow.parentRunId` = '{parent}'"
    children = client.search_runs([experiment.experiment_id], nested, order_by=["metrics.`eval/fid` ASC"])
    assert len(children) == TRIALS
    last = {line["trial"]: line for line in rows(out)}
    for child in children:
        line = last[child.data.tags["eqm_dist.trial"]]
        assert child.data.metrics["eval/fid"] == float(line["fid"])
        assert child.data.metrics["eval/samples"] == float(line["samples"])
        assert child.data.params["sampler.step_size"] == line["sampler.step_size"]
        assert child.info.status == "FINISHED"
    history = client.get_metric_history(children[0].info.run_id, "eval/fid")
    assert [point.step for point in history] == sorted({point.step for point in history})
    whole = client.get_run(parent)
    assert whole.info.status == "FINISHED"
    best = rows(out)[0]
    assert whole.data.metrics["eval/fid"] == float(best["fid_mean"])
    assert whole.data.metrics["eval/fid_std"] == float(best["fid_std"])
    assert whole.data.metrics["eval/fid_seeds"] == 2
    assert "The finalists, by seeds 1 to 2:" in whole.data.tags["mlflow.note.content"]
    child = next(child for child in children if child.data.tags["eqm_dist.trial"] == best["trial"])
    by_seed = client.get_metric_history(child.info.run_id, "eval/fid_by_seed")
    assert [point.step for point in by_seed] == [1, 2]
    assert statistics.fmean(point.value for point in by_seed) == pytest.approx(float(best["fid_mean"]))
    artifacts = {file.path for file in client.list_artifacts(parent)}
    pictures = {"fid_nfe.png", "fid_step_size.png", "parallel.png", "finalists.png"}
    assert {"best.yaml", "results.csv", *pictures} <= artifacts


def test_it_is_recorded_where_the_user_says_and_not_where_the_model_was(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    foreign = tmp_path / "theirs" / "tiny"
    shutil.copytree(run, foreign)
    checkpoint = foreign / "checkpoints" / "step_00000030"
    config = yaml.safe_load((checkpoint / "config.yaml").read_text())
    config["track"] |= {"mlflow_uri": "http://127.0.0.1:9", "experiment": "theirs"}  # a server that nobody runs
    content = yaml.safe_dump(config).encode()
    (checkpoint / "config.yaml").write_bytes(content)
    marker = json.loads((checkpoint / "COMPLETE.json").read_bytes())
    marker["files"]["config.yaml"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "COMPLETE.json").write_text(json.dumps(marker))
    space = {"sampler.name": "gd", "sampler.nfe": [2, 3]}
    for name, others, store in (
        ("default", {}, tmp_path / "runs" / "mlflow.db"),
        ("mine", {"track.mlflow_uri": f"sqlite:///{tmp_path / 'mine.db'}"}, tmp_path / "mine.db"),
    ):
        own = {"run.root": tmp_path / "runs", "evaluation.extractor": "sweep_extractor:Pixels",
               "reference": run.parent / "data" / "blots"}  # fmt: skip
        main(flags(foreign, tmp_path / name, space, **{"track.mlflow": "true", **own, **others}))
        assert json.loads((tmp_path / name / "mlflow.json").read_text())["tracking_uri"] == f"sqlite:///{store}"
        assert store.exists()


def test_what_cannot_be_is_said_before_anything_is_written(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    eta = "sampler.step_size"
    for space, message in (
        ({"sampler.stepsize": [1]}, "did you mean sampler.step_size"),
        ({"train.steps": [1]}, "train.steps is not an option|train.steps cannot be an axis"),
        ({"sampler.name": "gd", "sampler.momentum": [0.3]}, "momentum has no effect with name=gd"),
        ({eta: [0.1, -1]}, "step_size: should be greater than 0, got -1"),
    ):
        with pytest.raises(ConfigError, match=message):
            main(flags(run, out, space))
    with pytest.raises(ConfigError, match="--trials has no effect on --search grid"):
        main(flags(run, out, trials=3))
    with pytest.raises(ConfigError, match="must be a positive number of hours, got 0"):
        main(flags(run, out, hours=0))
    for others, message in (
        ({"rungs": "16,64"}, "--rungs must not be above the 48 samples of the last rung, got 64"),
        ({"storage": "study.db"}, "--storage has no effect on --search grid"),
        ({"seeds": 3}, "--seeds has no effect with --finalists 1"),
        ({"finalists": 2, "seeds": 1}, "--seeds must be at least 2, got 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            main(flags(run, out, **others))
    assert not out.exists()


def test_another_sweep_in_the_same_directory_is_refused(run: Path, tmp_path: Path) -> None:
    space = {"sampler.name": "gd", "sampler.nfe": [2, 3]}
    main(flags(run, tmp_path / "sweep", space))
    with pytest.raises(ConfigError, match=r"seed was 0 when the sweep in .* began and is now 1"):
        main(flags(run, tmp_path / "sweep", space, seed=1))


def test_a_dry_run_writes_nothing(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*flags(run, tmp_path / "sweep"), "--dry-run"])
    printed = capsys.readouterr().out
    assert f"{TRIALS} (grid, on 6 descents)" in printed
    assert "NFE, of one image each" in printed
    assert not (tmp_path / "sweep").exists()


@pytest.mark.slow
def test_a_terminated_sweep_ends_in_a_sentence_and_goes_on(run: Path, tmp_path: Path) -> None:
    out, space = tmp_path / "sweep", {"sampler.name": "gd", "sampler.step_size": [0.02, 0.1], "sampler.nfe": [1000]}
    command = [sys.executable, str(SCRIPT), *flags(run, out, space)]
    process = subprocess.Popen(command, env=environment(run), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 100
    while not (out / "results.jsonl").exists() or not results(out):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)
    process.terminate()
    printed, said = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "is complete" not in printed
    assert said == "terminated; run the same command again to resume.\n"
    first = results(out)
    main(flags(run, out, space))
    assert results(out)[: len(first)] == first
    assert len(rows(out)) == 2


def environment(run: Path) -> dict[str, str]:
    """Of a command in a process of its own, with a cluster of its own and the extractor of the tiny run."""
    path = f"{run.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return {**os.environ, "RAY_ADDRESS": "local", "PYTHONPATH": path}


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_sweep_goes_on(run: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "killed"
    space = [{**part, "sampler.nfe": [400, 401, 402]} for part in SPACE]
    main(flags(run, whole, space))
    command = [sys.executable, str(SCRIPT), *flags(run, out, space, launcher="ray", actors=2)]
    # Into files: a pipe would stay open for as long as any process of the killed driver's cluster lives.
    with (tmp_path / "killed.txt").open("w") as said:
        process = subprocess.Popen(command, env=environment(run), stdout=said, stderr=subprocess.STDOUT)
    end = time.monotonic() + 200
    while not (out / "results.jsonl").exists() or len(results(out)) < 4:
        assert process.poll() is None, (tmp_path / "killed.txt").read_text()
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = (out / "results.jsonl").read_bytes()
    with (tmp_path / "done.txt").open("w") as said:
        done = subprocess.run(
            command, env=environment(run), stdout=said, stderr=subprocess.STDOUT, timeout=250, check=False
        )
    assert done.returncode == 0, (tmp_path / "done.txt").read_text()
    assert (out / "results.jsonl").read_bytes().startswith(before)
    fids = {row["trial"]: row["fid"] for row in rows(out)}
    for row in rows(whole):
        assert float(fids[row["trial"]]) == pytest.approx(float(row["fid"]), rel=1e-3)


def result(fid: float | None, nfe: float, samples: int = 10) -> Result:
    point = {"sampler.step_size": fid, "sampler.nfe": nfe}
    return Result(point, samples, fid, None if fid is None else nfe, 1.0, None if fid is not None else "why")


def test_ranking_puts_the_better_known_first_and_failures_last() -> None:
    poor, fair, good, failed = result(3.0, 5), result(2.0, 5), result(1.0, 9), result(None, 9)
    longer = Result(poor.overrides, 20, 4.0, 5.0, 1.0)
    assert ranked([poor, failed, fair, longer, good]) == [longer, good, fair, failed]
    text = table(ranked([poor, failed, fair, longer, good]), list(poor.overrides), most=2)
    assert "... and 1 more in results.csv" in text
    assert "failed: step_size None, nfe 9: why" in text


def test_survivors_are_the_best_and_the_pareto_front() -> None:
    cheap, middle, worse, best = result(9.0, 1), result(5.0, 3), result(6.0, 4), result(1.0, 8)
    assert pareto_front([best, worse, middle, cheap]) == [cheap, middle, best]
    assert survivors([best, worse, middle, cheap, result(None, 1)], reduction=4) == [best, cheap, middle]
    assert survivors([best, worse], reduction=1) == [best, worse]


def test_a_ledger_drops_half_a_line(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, {"seed": 0}, Result)
    ledger.add(result(1.0, 2))
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"overrides"')
    assert Ledger(tmp_path, {"seed": 0}, Result).results == [result(1.0, 2)]
