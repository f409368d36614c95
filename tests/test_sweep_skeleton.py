"""What every sweep does, with work that takes no time: the ledger, the record, how it ends, what it shows."""

import json
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from mlflow import MlflowClient

from eqm_dist import cli
from eqm_dist.config import TrackConfig
from eqm_dist.errors import DataError, LaunchError, Terminated
from eqm_dist.presets import digits
from eqm_dist.runs import sweep_directory
from eqm_dist.sweeps.deadline import Deadline
from eqm_dist.sweeps.ledger import Ledger
from eqm_dist.sweeps.live import Live
from eqm_dist.sweeps.record import Record
from eqm_dist.sweeps.report import title, write_best
from eqm_dist.sweeps.search import Search
from eqm_dist.sweeps.spaces import parse_space
from eqm_dist.sweeps.sweep import Findings, Sweep, run_sweep
from eqm_dist.track.mlflow import MlflowRun, SweepRecord, open_run

ETA = "sampler.step_size"
Work = Callable[[Ledger["Found"], Deadline, SweepRecord | None], bool]


@dataclass(frozen=True)
class Found:
    """A result."""

    name: str
    fid: float


@pytest.fixture(scope="module")
def track(tmp_path_factory: pytest.TempPathFactory) -> TrackConfig:
    """One store for all: to make one takes seconds."""
    return TrackConfig(mlflow_uri=f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}")


def search(root: Path) -> Search:
    return Search(parse_space({ETA: [0.1, 0.2]}, [ETA], "test"), "grid", 1, 0, root / "sweep")


def run(root: Path, work: Work, track: TrackConfig) -> str:
    """The sweep of that work."""
    out = root / "sweep"

    def conclude(results: Sequence[Found]) -> Findings:
        best = min(found.fid for found in results)
        return Findings([f"{len(results)} found"], [write_best(out, ["it is the best"], {"a": 1})], {"eval/fid": best})

    def log(record: SweepRecord, found: Found) -> None:
        record.log_trial(found.name, found.name, {}, {"eval/fid": found.fid}, 1, None)

    record = Record(track, root, digits(), {"extra": "yes"})
    return run_sweep(Sweep(search(root), {}, Found, record, log, work, conclude), None)


def recorded(root: Path) -> tuple[MlflowClient, str]:
    known = json.loads((root / "sweep" / "mlflow.json").read_text())
    return MlflowClient(known["tracking_uri"]), known["run_id"]


def find(names: str, complete: bool, ledger: Ledger[Found], *_: object) -> bool:
    """Work that finds what the ledger does not have."""
    known = {found.name for found in ledger.results}
    for number, name in enumerate(names):
        if name not in known:
            ledger.add(Found(name, 1.0 + number))
    return complete


def test_a_sweep_goes_on_with_its_ledger_and_sends_every_result_once(tmp_path: Path, track: TrackConfig) -> None:
    report = run(tmp_path, partial(find, "ab", False), TrackConfig(mlflow=False))  # as if all was missed
    assert report.splitlines()[1:] == [f"{tmp_path / 'sweep'}: the time is up; the same command goes on", "", "2 found"]
    assert not (tmp_path / "sweep" / "mlflow.json").exists()
    for names, status, words in (("abc", False, "the time is up"), ("abc", True, "is complete")):
        report = run(tmp_path, partial(find, names, status), track)
        assert words in report
        assert report.endswith("3 found")
        client, parent = recorded(tmp_path)
        assert client.get_run(parent).info.status == ("FINISHED" if status else "KILLED")
    experiment = client.get_experiment_by_name("eqm-dist-sweeps")
    assert experiment is not None
    children = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert sorted((child.info.run_name, child.data.metrics["eval/fid"]) for child in children) == [
        ("a", 1.0),
        ("b", 2.0),
        ("c", 3.0),
    ]
    whole = client.get_run(parent).data
    assert whole.metrics["eval/fid"] == 1.0
    assert whole.params == {"search": "grid", "trials": "2", "seed": "0", "extra": "yes"}
    assert {file.path for file in client.list_artifacts(parent)} == {"config.yaml", "best.yaml"}


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, "KILLED"), (LaunchError, "FAILED")])
def test_a_sweep_that_is_cut_short_closes_its_record(
    tmp_path: Path, track: TrackConfig, error: type[BaseException], status: str
) -> None:
    def work(ledger: Ledger[Found], *_: object) -> bool:
        ledger.add(Found("a", 1.0))
        raise error

    with pytest.raises(error):
        run(tmp_path, work, track)
    client, parent = recorded(tmp_path)
    assert client.get_run(parent).info.status == status
    assert len((tmp_path / "sweep" / "results.jsonl").read_text().splitlines()) == 1


def test_a_whole_sweep_without_an_fid_has_failed_and_one_whose_time_is_up_has_not(
    tmp_path: Path, track: TrackConfig
) -> None:
    def conclude(results: Sequence[Found]) -> Findings:
        return Findings(["nothing"], failure="No trial gave an FID.")

    for complete in (False, True):
        record = Record(track, tmp_path, digits(), {})
        sweep = Sweep(search(tmp_path), {}, Found, record, lambda *_: None, lambda *_, done=complete: done, conclude)
        if complete:
            with pytest.raises(LaunchError, match="No trial gave an FID"):
                run_sweep(sweep, None)
        else:
            assert "the time is up" in run_sweep(sweep, None)
        client, parent = recorded(tmp_path)
        assert client.get_run(parent).info.status == ("FAILED" if complete else "KILLED")


def test_a_sweep_that_is_terminated_closes_its_record_and_leaves_the_signal_to_others(
    tmp_path: Path, track: TrackConfig
) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def work(ledger: Ledger[Found], *_: object) -> bool:
        ledger.add(Found("a", 1.0))
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None  # as Ray does with whatever a handler raises
        return True

    try:
        with pytest.raises(Terminated):
            run(tmp_path, work, track)
    finally:
        signal.signal(signal.SIGTERM, before)
    client, parent = recorded(tmp_path)
    assert client.get_run(parent).info.status == "KILLED"
    assert run(tmp_path, partial(find, "ab", True), track).endswith("2 found")
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_terminated_command_leaves_with_143_and_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    def main(_: Sequence[str]) -> None:
        raise Terminated

    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    assert ended.value.code == 143
    assert capsys.readouterr().err == "terminated; run the same command again to resume.\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("settings.json", b"[" * 100_000, "nested too deeply"),
        ("settings.json", b"[1]", "holds list instead of an object"),
        ("settings.json", b"\xff", "must be the JSON that says what a sweep is"),
        ("results.jsonl", b'{"name": "a"}\n', "must be a result of this kind of sweep, and one is not .fid:"),
        ("results.jsonl", b'{"name": "a", "fid": "x"}\n', "must be a result of this kind of sweep"),
        ("results.jsonl", b"[1]\n", "must be a JSON object"),
    ],
)
def test_a_damaged_ledger_is_refused_in_a_sentence(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    Ledger(tmp_path, {"seed": 0}, Found).add(Found("a", 1.0))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        Ledger(tmp_path, {"seed": 0}, Found)


def test_a_submitted_job_says_where_and_on_which_machine_its_results_lie(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert title(tmp_path / "s", True) == f"{tmp_path / 's'} is complete"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.chdir(tmp_path)
    assert sweep_directory("decay") == Path.home() / "sweeps" / "decay"
    assert title(sweep_directory("decay"), True) == f"{Path.home()}/sweeps/decay on {socket.gethostname()} is complete"


def test_a_training_is_closed_once_and_only_where_the_sweep_is_recorded(tmp_path: Path, track: TrackConfig) -> None:
    for name in ("sweep", "run"):
        (tmp_path / name).mkdir()
    record = Record(track, tmp_path, digits(), {}).open(search(tmp_path))
    assert record is not None
    uri = record.parent.tracking_uri
    run = open_run(
        tmp_path / "run", name="run", tracking_uri=uri, experiment="test", params={}, config_yaml="", timeout_s=20
    )
    client = MlflowClient(uri)
    record.close_trial(MlflowRun("http://127.0.0.1:9", run.run_id, 1.0), "FINISHED")  # a server that nobody runs
    assert client.get_run(run.run_id).info.status == "RUNNING"
    record.close_trial(run, "KILLED")
    closed = client.get_run(run.run_id).info
    record.close_trial(run, "KILLED")
    assert closed.status == "KILLED"
    assert client.get_run(run.run_id).info.end_time == closed.end_time


def test_news_has_the_best_point_how_trials_are_and_the_time(caplog: pytest.LogCaptureFixture) -> None:
    package = logging.getLogger("eqm_dist")
    before = package.handlers, package.propagate
    package.handlers, package.propagate = [], True  # a command that ran before in this process may have set them up
    try:
        with caplog.at_level(logging.INFO, "eqm_dist"):
            Live(3, 10, [ETA], lambda: None).show("it began", 5, {})
            Live(1, 10, [ETA], lambda: (1.5, {ETA: 0.1})).show("it ended", 10, {"complete": 1, "failed": 0})
            Live(1, 10, [ETA], lambda: None, every_s=60).show("too soon", 5, {})
    finally:
        package.handlers, package.propagate = before
    assert caplog.messages == [
        "it began | no FID yet | none complete of 3 trials | at most 0:00:01 left",
        "it ended | best FID 1.500: step_size 0.1 | 1 complete of 1 trial | at most 0:00:00 left",
    ]
