"""The record of a run: metrics.jsonl through kills, and MLflow in a real store and on a real server that dies."""

import json
import math
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

from eqm_dist.config import Config
from eqm_dist.errors import DataError, TrackingError
from eqm_dist.options import dump, flatten, parse
from eqm_dist.run_directory import MLFLOW_FILE
from eqm_dist.storage.lock import locked
from eqm_dist.track.jsonl import JsonlTracker, last_values, read_metrics
from eqm_dist.track.mlflow import MlflowRun, MlflowTracker, close_run, default_uri, open_run, recorded_run
from eqm_dist.track.result import read_result
from tests import tiny

# --- metrics.jsonl ---


def steps(file: Path) -> list[int]:
    return [line["step"] for line in read_metrics(file)]


def test_what_is_logged_is_read_back(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(file, resume_step=0)
    assert list(read_metrics(file)) == []
    tracker.log(1, {"train/loss": 0.1 + 0.2, "train/grad_norm": 1e-300})
    tracker.log(1, {"eval/fid": math.inf})
    tracker.log(2, {"train/loss": 1.0})
    tracker.finish()
    assert list(read_metrics(file)) == [
        {"step": 1, "train/loss": 0.1 + 0.2, "train/grad_norm": 1e-300},
        {"step": 1, "eval/fid": pytest.approx(math.nan, nan_ok=True)},  # JSON has no infinity
        {"step": 2, "train/loss": 1.0},
    ]
    assert all(json.loads(line, parse_constant=pytest.fail) for line in file.read_text().splitlines())
    assert math.isnan(last_values(file).pop("eval/fid"))


def test_resuming_drops_what_comes_after_the_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    first = JsonlTracker(file, resume_step=0)
    for step in range(1, 7):
        first.log(step, {"train/loss": float(step)})
        if step % 2 == 0:
            first.log(step, {"eval/fid": 1.0})
    second = JsonlTracker(file, resume_step=4)
    assert steps(file) == [1, 2, 2, 3, 4, 4]
    second.log(5, {"train/loss": 50.0})
    assert steps(file) == [1, 2, 2, 3, 4, 4, 5]
    assert last_values(file)["train/loss"] == 50.0


def test_a_line_that_a_kill_cut_short_is_not_one(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(file, resume_step=0)
    tracker.log(1, {"train/loss": 1.5})
    tracker.log(2, {"train/loss": 2.5})
    content = file.read_bytes()
    first = content.index(b"\n") + 1
    for length in range(first, len(content)):
        file.write_bytes(content[:length])
        assert steps(file) == [1]
        JsonlTracker(file, resume_step=2).log(2, {"train/loss": 9.0})
        assert [line["train/loss"] for line in read_metrics(file)] == [1.5, 9.0]


def test_lines_that_cannot_be_written_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "run" / "metrics.jsonl"
    file.parent.mkdir()
    tracker = JsonlTracker(file, resume_step=0)
    tracker.log(1, {"train/loss": 1.0})
    file.parent.rename(tmp_path / "away")
    for step in (2, 3):
        tracker.log(step, {"train/loss": 1.0 / step})
    sentence = f"Cannot append to {file}: No such file or directory"
    assert caplog.text.count(f"warning: {sentence}") == 1
    assert "Metrics from step 2 on are kept" in caplog.text
    tracker.finish()
    assert "The last 2 lines are not in it" in caplog.text
    (tmp_path / "away").rename(file.parent)
    tracker.log(4, {"train/loss": 0.25})
    tracker.finish()
    assert list(read_metrics(file)) == [{"step": step, "train/loss": 1.0 / step} for step in (1, 2, 3, 4)]


# --- MLflow in a SQLite store ---

# What DESIGN calls the field's words; a run on CPUs has no throughput/mfu, for nobody states a CPU's peak.
TRAIN_METRICS = {
    "train/loss", "train/grad_norm", "train/learning_rate", "train/images_seen", "time/step_s", "time/data_wait_s",
    "throughput/images_per_s", "memory/peak_gib", "train/skipped_updates", "train/rollbacks",
    "run/restarts", "run/lost_steps", "run/goodput",
}  # fmt: skip
EVALUATION_METRICS = {"eval/fid", "eval/fid_yardstick", "eval/samples", "eval/nfe", "time/evaluation_s"}


def recorded_flags(root: Path, **others: Any) -> list[str]:
    """A tiny model on the digits, whose classifier the evaluation needs."""
    return tiny.flags(
        {
            "run.root": str(root),
            "run.name": "recorded",
            "model.hidden_size": 16,
            "model.depth": 1,
            "model.num_heads": 2,
            "optimizer.schedule": "constant",
            "train.steps": 4,
            "train.global_batch": 8,
            "train.log_every": 1,
            "checkpoint.every": 2,
            "evaluation.every": 2,
            "evaluation.samples": 20,
            "sampler.nfe": 2,
            "launch.launcher": "local",
            **others,
        }
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a finished run of four steps, recorded in MLflow's default store."""
    root = tmp_path_factory.mktemp("recorded")
    ended = tiny.train(*recorded_flags(root))
    assert (ended.code, ended.err) == (0, "")
    return root


def run_id(root: Path, name: str = "recorded") -> str:
    return json.loads((root / name / MLFLOW_FILE).read_bytes())["run_id"]


def client(root: Path) -> MlflowClient:
    return MlflowClient(default_uri(root))


def recorded(root: Path) -> Run:
    return client(root).get_run(run_id(root))


def history(root: Path, key: str) -> list[tuple[int, float]]:
    points = client(root).get_metric_history(run_id(root), key)
    return [(point.step, point.value) for point in sorted(points, key=lambda point: (point.step, point.timestamp))]


def logged(root: Path, key: str) -> list[tuple[int, float]]:
    lines = read_metrics(root / "recorded" / "metrics.jsonl")
    return [(line["step"], line[key]) for line in lines if key in line]


def test_mlflow_has_the_whole_config(root: Path, tmp_path: Path) -> None:
    run = recorded(root)
    config = parse(Config, yaml.safe_load((root / "recorded" / "config.yaml").read_text(encoding="utf-8")))
    assert run.data.params == {key: str(value) for key, value in flatten(dump(config)).items()}
    artifact = client(root).download_artifacts(run.info.run_id, "config.yaml", str(tmp_path))
    assert parse(Config, yaml.safe_load(Path(artifact).read_text(encoding="utf-8"))) == config
    assert (run.info.artifact_uri or "").startswith((root / "mlflow-artifacts").as_uri())


def test_mlflow_run_is_finished_and_named(root: Path) -> None:
    run = recorded(root)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "recorded"
    assert client(root).get_experiment(run.info.experiment_id).name == "eqm-dist"
    assert run.data.tags["eqm_dist.run_directory"] == str(root / "recorded")
    assert [found.info.run_id for found in client(root).search_runs([run.info.experiment_id])] == [run.info.run_id]


def test_metrics_have_the_names_of_the_design(root: Path) -> None:
    names = {name for name in recorded(root).data.metrics if not name.startswith("system/")}
    assert names == TRAIN_METRICS | EVALUATION_METRICS
    assert names == set().union(*(line.keys() - {"step"} for line in read_metrics(root / "recorded/metrics.jsonl")))


@pytest.mark.parametrize("key", sorted(TRAIN_METRICS | EVALUATION_METRICS))
def test_mlflow_has_every_point_of_the_file(key: str, root: Path) -> None:
    assert history(root, key) == logged(root, key)
    assert [step for step, _ in history(root, key)] == ([1, 2, 3, 4] if key in TRAIN_METRICS else [2, 4])


def test_figures_are_what_their_names_say(root: Path) -> None:
    assert logged(root, "train/images_seen") == [(step, 8.0 * step) for step in (1, 2, 3, 4)]
    assert dict(logged(root, "eval/samples")) == {2: 20.0, 4: 20.0}
    assert dict(logged(root, "eval/nfe")) == {2: 2.0, 4: 2.0}
    # Warm-up of the preset: 100 steps to 2e-3.
    assert dict(logged(root, "train/learning_rate"))[4] == pytest.approx(2e-3 * 4 / 101)
    seconds, images = dict(logged(root, "time/step_s")), dict(logged(root, "throughput/images_per_s"))
    assert all(images[step] == pytest.approx(8 / seconds[step]) for step in seconds)
    assert all(0 <= value <= seconds[step] for step, value in logged(root, "time/data_wait_s"))
    assert all(0.01 < value < 100 for _, value in logged(root, "memory/peak_gib"))
    result = read_result(root / "recorded")
    assert result is not None
    assert result["metrics"] == last_values(root / "recorded" / "metrics.jsonl")


def test_mlflow_has_the_pictures_by_step(root: Path) -> None:
    paths = [file.path for file in client(root).list_artifacts(run_id(root), "images")]
    pictures = [path for path in paths if path.endswith(".png")]
    # KEY+step+STEP+timestamp+... is how the UI knows a series.
    assert sorted(Path(path).name.split("+")[:3] for path in pictures) == [
        ["samples", "step", "2"],
        ["samples", "step", "4"],
    ]
    assert sorted(file.name for file in (root / "recorded" / "samples").iterdir()) == [
        "samples_step00000002.png",
        "samples_step00000004.png",
    ]


def test_starting_a_finished_run_again_changes_nothing_in_the_record(root: Path) -> None:
    before, points = recorded(root), history(root, "train/loss")
    ended = tiny.train(*recorded_flags(root))
    assert (ended.code, ended.err) == (0, "")
    assert "run recorded is complete" in ended.out
    after = recorded(root)
    assert after.info.run_id == before.info.run_id
    assert after.info.status == "FINISHED"
    assert (after.data.params, after.data.tags) == (before.data.params, before.data.tags)
    assert history(root, "train/loss") == points


def test_steps_that_are_done_again_are_recorded_once(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "copy")
    copy = tmp_path / "copy"
    for file in copy.glob("recorded/*.*"):  # the run lies elsewhere now
        if file.suffix in (".yaml", ".json"):
            file.write_text(file.read_text(encoding="utf-8").replace(str(root), str(copy)), encoding="utf-8")
    # As if it had been killed after it reported step 4 and before it saved it.
    shutil.rmtree(copy / "recorded" / "checkpoints" / "step_00000004")
    (copy / "recorded" / "result.json").unlink()
    losses = history(root, "train/loss")
    ended = tiny.train(*recorded_flags(copy, **{"train.steps": 6}))
    assert (ended.code, ended.err) == (0, "")
    assert run_id(copy) == run_id(root)
    assert [step for step, _ in history(copy, "train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in history(copy, "eval/fid")] == [2, 4, 6]
    assert history(copy, "train/loss")[:4] == losses
    assert logged(copy, "train/loss") == history(copy, "train/loss")
    assert recorded(copy).info.status == "FINISHED"
    assert recorded(copy).data.params["train.steps"] == "4"
    assert recorded(copy).data.tags["resumed.train.steps"] == "6"


def test_what_a_killed_attempt_had_not_sent_is_sent_by_the_next(root: Path, tmp_path: Path) -> None:
    run = new_run(tmp_path, default_uri(root), timeout_s=20)
    lines = [{"step": step, "train/loss": step + 0.5} for step in (1, 2, 3, 4)]
    first = MlflowTracker(run)
    for line in lines[:2]:
        first.log(line["step"], {"train/loss": line["train/loss"]})
    first.finish()
    second = MlflowTracker(run, lines)  # from metrics.jsonl, which never waits for anybody
    second.log(5, {"train/loss": 5.5})
    second.finish()
    close_run(run, "FINISHED")
    points = client(root).get_metric_history(run.run_id, "train/loss")
    assert sorted((point.step, point.value) for point in points) == [(step, step + 0.5) for step in (1, 2, 3, 4, 5)]


def test_a_run_that_fails_is_recorded_as_failed(root: Path) -> None:
    ended = tiny.train(*recorded_flags(root, **{"run.name": "failed", "train.precision": "tf32"}))
    assert ended.code == 2
    assert client(root).get_run(run_id(root, "failed")).info.status == "FAILED"


@pytest.mark.parametrize(
    ("content", "reason"), [(b"no database" * 1000, "file is not a database"), (None, "File exists")]
)
def test_a_store_that_cannot_be_opened_is_named(content: bytes | None, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "store"
    file.write_bytes(content or b"")
    uri = f"sqlite:///{file}" if content else f"sqlite:///{file}/below"
    with pytest.raises(TrackingError, match=f"The MLflow store {uri} must answer, but it did not .*{reason}") as raised:
        new_run(tmp_path, uri, timeout_s=5)
    assert "\n" not in str(raised.value)


def new_run(directory: Path, uri: str, timeout_s: float) -> MlflowRun:
    directory.mkdir(exist_ok=True)
    return open_run(
        directory, name="run", tracking_uri=uri, experiment="test", params={"a": 1}, config_yaml="a: 1\n",
        timeout_s=timeout_s,
    )  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> str:
    """A store in a file, with the run of ``tmp_path / "old"``."""
    uri = default_uri(tmp_path)
    new_run(tmp_path / "old", uri, timeout_s=30)
    return uri


def test_a_run_deleted_in_mlflow_says_how_to_go_on(store: str, tmp_path: Path) -> None:
    (run,) = MlflowClient(store).search_runs(["1"])
    MlflowClient(store).delete_run(run.info.run_id)
    record = tmp_path / "old" / MLFLOW_FILE
    with pytest.raises(TrackingError) as raised:
        new_run(tmp_path / "old", store, timeout_s=30)
    assert str(raised.value) == (
        f"{store} answers, but the run {run.info.run_id} was deleted there; restore it there, or delete {record} to"
        " record run anew."
    )
    record.unlink()
    assert new_run(tmp_path / "old", store, timeout_s=30).run_id != run.info.run_id


def test_a_run_of_another_store_says_how_to_go_on(store: str, tmp_path: Path) -> None:
    record = tmp_path / "old" / MLFLOW_FILE
    record.write_text(json.dumps({**json.loads(record.read_bytes()), "run_id": "f" * 32}), encoding="utf-8")
    with pytest.raises(TrackingError, match=f"answers, but does not know the run {'f' * 32}; name the right store, or"):
        new_run(tmp_path / "old", store, timeout_s=30)


def test_an_experiment_deleted_in_mlflow_says_how_to_go_on(store: str, tmp_path: Path) -> None:
    MlflowClient(store).delete_experiment("1")
    with pytest.raises(TrackingError) as raised:
        new_run(tmp_path / "new", store, timeout_s=30)
    assert str(raised.value) == (
        f"{store} answers, but the experiment test was deleted there; restore it there, or choose another"
        " --track.experiment."
    )


def test_a_store_of_another_release_says_how_to_go_on(store: str, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "mlflow.db") as tables:
        tables.execute("UPDATE alembic_version SET version_num = '181f10493468'")  # of MLflow 1.0
    tables.close()
    script = f"from tests.test_track import *; new_run(Path({str(tmp_path / 'new')!r}), {store!r}, 30)"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.stderr.splitlines()[-1] == (
        f"eqm_dist.errors.TrackingError: The MLflow store {store} must be of this release of MLflow, and is of another;"
        f" copy it and run `mlflow db upgrade {store}`, or name another --track.mlflow_uri."
    )


def test_a_run_that_is_deleted_while_it_trains_goes_on(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = new_run(tmp_path / "old", store, timeout_s=30)
    MlflowClient(store).delete_run(run.run_id)
    tracker = MlflowTracker(run)
    tracker.log(1, {"train/loss": 1.5})
    tracker.finish()
    (line,) = [record.getMessage() for record in caplog.records if "deleted" in record.getMessage()]
    assert line.endswith("The run goes on without it; metrics.jsonl has everything.")


def test_processes_that_open_a_new_store_at_once_all_have_it(tmp_path: Path) -> None:
    """Two that make the tables of one store collide."""
    script = (
        "import sys; from tests.test_track import *; new_run(Path(sys.argv[1]), default_uri(Path(sys.argv[2])), 60)"
    )
    commands = [[sys.executable, "-c", script, str(tmp_path / name), str(tmp_path)] for name in "abc"]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    assert [(process.communicate()[1], process.returncode) for process in processes] == [("", 0)] * 3
    assert len(client(tmp_path).search_runs(["1"])) == 3


def test_a_store_that_another_process_keeps_opening_is_named(tmp_path: Path) -> None:
    uri = default_uri(tmp_path)
    with (
        locked(tmp_path / "mlflow.db.lock"),
        pytest.raises(
            TrackingError, match=rf"^The MLflow store {uri} is being opened: .* must be free within 0.3 s, but"
        ),
    ):
        new_run(tmp_path / "run", uri, timeout_s=0.3)
    assert new_run(tmp_path / "run", uri, timeout_s=30).tracking_uri == uri


def test_a_root_with_a_per_cent_sign_gets_no_twin(tmp_path: Path) -> None:
    """Neither from MLflow, which takes the %25 of an address for a part of the name, nor from us."""
    root = tmp_path / "a%b what?"
    root.mkdir()
    run = new_run(root / "run", default_uri(root), timeout_s=30)
    tracker = MlflowTracker(run)
    tracker.log(1, {"train/loss": 1.5})
    tracker.finish()
    close_run(run, "FINISHED")
    assert [path.name for path in tmp_path.iterdir()] == [root.name]
    assert history_of(root / "mlflow.db") == [(1, 1.5)]


def history_of(store: Path) -> list[tuple[int, float]]:
    with sqlite3.connect(store) as tables:
        found = tables.execute("SELECT step, value FROM metrics WHERE key = 'train/loss'").fetchall()
    tables.close()
    return found


@pytest.mark.parametrize(
    "content", [b"", b"null", b"{}", b"[" * 100_000, b'{"tracking_uri": 1, "run_id": 2, "timeout_s": 3}']
)
def test_a_damaged_record_of_where_a_run_is_recorded_is_one_sentence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / MLFLOW_FILE).write_bytes(content)
    for read in (recorded_run, lambda path: new_run(path, default_uri(tmp_path), timeout_s=30)):
        with pytest.raises(DataError, match=r"must say where the run is recorded.*; restore or delete it") as raised:
            read(tmp_path)
        assert "\n" not in str(raised.value)


# --- an MLflow server ---


def free_port() -> int:
    """One that stays free until it is taken on purpose: the kernel and Ray give theirs out of other ranges."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    candidates = range(20_000, first) or range(1024, 10_000)
    while True:
        port = random.choice(candidates)
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


@contextmanager
def mlflow_server(store: Path, port: int) -> Iterator[None]:
    """A tracking server on loopback; at the end it is killed like a machine that goes down."""
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{store / 'server.db'}", "--artifacts-destination", str(store / "artifacts"),
    ]  # fmt: skip
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (store / "server.log").open("ab") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                assert server.poll() is None, (store / "server.log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)
        yield
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # the group that it leads: itself and its one worker
        server.wait()


@pytest.mark.parametrize("silent", [False, True], ids=["nobody listens", "nobody answers"])
def test_a_server_that_does_not_answer_ends_the_command_before_anything_starts(
    silent: bool, shards: Path, tmp_path: Path
) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if silent:
            listener.listen()
        uri = f"http://127.0.0.1:{listener.getsockname()[1]}"
        tracked = {"track.mlflow": True, "track.mlflow_uri": uri, "track.timeout_s": 1}
        started = time.monotonic()
        ended = tiny.train(*tiny.flags(tiny.overrides(tmp_path, shards, **tracked)))
        assert time.monotonic() - started < 15  # a second for the answer, the rest for a machine that is busy
    reason = "timed out" if silent else r"\[Errno 111\] Connection refused"
    assert ended.code == 1
    assert re.fullmatch(
        rf"error: The MLflow store {uri} must answer, but it did not \({reason}\); start the server, correct "
        r"--track\.mlflow_uri, or use --track\.mlflow false\.\n",
        ended.err,
    )
    assert {file.name for file in (tmp_path / "tiny").iterdir()} <= {"config.yaml", "manifest.json"}
    # Nothing has begun, so the remedy is open: also with options that decide the numbers.
    ended = tiny.train(*tiny.flags(tiny.overrides(tmp_path, shards, **{"optimizer.learning_rate": 0.01})))
    assert ended.code == 0


def test_nothing_is_lost_when_the_server_dies_and_comes_back(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    picture = tmp_path / "samples_step00000003.png"
    write_picture(picture)
    store = MlflowClient(f"sqlite:///{tmp_path / 'server.db'}")

    def points(run: str) -> list[tuple[int, float]]:
        history = store.get_metric_history(run, "train/loss")
        return sorted((point.step, point.value) for point in history)

    with mlflow_server(tmp_path, port):
        tracked = {"track.mlflow": True, "track.mlflow_uri": uri}
        ended = tiny.train(*tiny.flags(tiny.overrides(tmp_path, shards, **tracked)))
        assert (ended.code, ended.err) == (0, "")
        whole = run_id(tmp_path, "tiny")
        assert [step for step, _ in points(whole)] == [1, 2, 3, 4, 5, 6]
        assert store.get_run(whole).info.status == "FINISHED"

        run = new_run(tmp_path, uri, timeout_s=5)
        tracker = MlflowTracker(run)
        tracker.log(1, {"train/loss": 1.5})
        while not points(run.run_id):
            time.sleep(0.05)
    for step in (2, 3):
        tracker.log(step, {"train/loss": step + 0.5})
    tracker.log_image(3, "samples", picture)
    time.sleep(0.5)  # time to fail
    with mlflow_server(tmp_path, port):
        tracker.log(4, {"train/loss": 4.5})
        tracker.finish()
        close_run(run, "FINISHED")
        assert points(run.run_id) == [(1, 1.5), (2, 2.5), (3, 3.5), (4, 4.5)]
        assert len([line for line in caplog.messages if "what is missed is sent later" in line]) == 1
        assert caplog.messages.count("MLflow answers again, and has what it missed") == 1
        assert store.get_run(run.run_id).info.status == "FINISHED"
        assert new_run(tmp_path, uri, timeout_s=5) == run  # the same run
        names = [Path(file.path).name for file in MlflowClient(uri).list_artifacts(run.run_id, "images")]
        assert [name.split("+")[:3] for name in names if name.endswith(".png")] == [["samples", "step", "3"]]
        close_run(run, "FINISHED")


def write_picture(path: Path) -> None:
    from PIL import Image

    Image.new("L", (8, 8)).save(path)
