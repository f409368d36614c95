"""MLflow as the record: one MLflow run per run, through every restart and resize.

Only this file imports mlflow. The driver opens the run and keeps its id in the run directory; rank 0 logs to that id
through a client. Ray's own helpers open a new run at each restart, so they are not used (docs/decisions).
"""

import getpass
import json
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from eqm_dist.documents import mapping_from_json, read_bounded
from eqm_dist.errors import BusyError, ConfigError, DataError, ForgottenError, StorageError, TrackingError
from eqm_dist.run_directory import CONFIG_FILE, MLFLOW_FILE
from eqm_dist.storage.files import atomic_write
from eqm_dist.storage.lock import locked

logger = logging.getLogger(__name__)

_STEP_TAG = "eqm_dist.step"
_PARAM_LIMIT = 500  # characters; the server's limit has changed between versions
_OPENED: set[str] = set()
"""Stores in files that this process has opened: their tables are there."""


@dataclass(frozen=True)
class MlflowRun:
    """Where a run is recorded."""

    tracking_uri: str
    run_id: str
    timeout_s: float


def default_uri(root: Path) -> str:
    """The SQLite store in the root of the runs, by absolute path."""
    # To SQLAlchemy what follows a question mark is no path, and %20 is a space.
    path = str(root / "mlflow.db").replace("%", "%25").replace("?", "%3F")
    return f"sqlite:///{path}"


def open_run(
    run_directory: Path,
    *,
    name: str,
    tracking_uri: str,
    experiment: str,
    params: Mapping[str, Any],
    config_yaml: str,
    timeout_s: float,
    artifacts: Path | None = None,
) -> MlflowRun:
    """Open the MLflow run of a run directory, or open it again; called by the driver before anything is computed.

    Args:
        run_directory: holds ``mlflow.json`` with the run id once it is known.
        name: name of the run in the UI.
        tracking_uri: a server, or an SQLite store.
        experiment: created if need be.
        params: flat; a param that changed since the start is recorded as a tag ``resumed.KEY``.
        config_yaml: stored as the artifact ``config.yaml``.
        timeout_s: longest wait for one answer of the server.
        artifacts: where a store without a server keeps files; default beside the run directory.

    Raises:
        DataError: what the run directory says of it is damaged.
        TrackingError: the server does not answer, or no longer knows the run.
    """
    record = run_directory / MLFLOW_FILE
    known = _read(record) if record.exists() else None
    with _answers(tracking_uri, timeout_s) as client:
        if known is not None and known.tracking_uri == tracking_uri:
            run = replace(known, timeout_s=timeout_s)
            with _forgotten(f"run {run.run_id}", f"delete {record} to record {name} anew"):
                client.update_run(run.run_id, status="RUNNING")
        else:
            experiment_id = _experiment_id(client, experiment, artifacts or run_directory.parent, tracking_uri)
            tags = {
                "mlflow.runName": name,
                "mlflow.user": getpass.getuser(),
                "mlflow.source.name": Path(sys.argv[0]).name,
                "eqm_dist.run_directory": str(run_directory),
            }
            with _forgotten(f"experiment {experiment}", "choose another --track.experiment"):
                created = client.create_run(experiment_id, tags=tags)
            run = MlflowRun(tracking_uri, created.info.run_id, timeout_s)
            atomic_write(record, json.dumps(asdict(run)).encode())
            client.log_text(run.run_id, config_yaml, CONFIG_FILE)
        logged = client.get_run(run.run_id).data.params
        for key, value in params.items():
            text = str(value)[:_PARAM_LIMIT]
            if key not in logged:
                client.log_param(run.run_id, key, text)
            elif logged[key] != text:
                client.set_tag(run.run_id, f"resumed.{key}", text)
    return run


def close_run(run: MlflowRun, status: str) -> None:
    """Set the final status: FINISHED, FAILED or KILLED. A dead server is reported, not raised: the work is done."""
    try:
        with _answers(run.tracking_uri, run.timeout_s) as client:
            client.set_terminated(run.run_id, status)
    except TrackingError as error:
        logger.warning("warning: %s", error)


def nest(run: MlflowRun, parent_id: str) -> None:
    """Show a run below another one, as a trial of its sweep.

    Raises:
        TrackingError: the server does not answer, or no longer knows the run.
    """
    with _answers(run.tracking_uri, run.timeout_s) as client:
        client.set_tag(run.run_id, "mlflow.parentRunId", parent_id)


def recorded_run(run_directory: Path) -> MlflowRun:
    """The MLflow run in which a training was recorded.

    Raises:
        ConfigError: the directory is not that of a run, or it was not recorded in MLflow.
        DataError: its record is damaged.
    """
    record = run_directory / MLFLOW_FILE
    if not record.exists():
        raise ConfigError(
            f"An MLflow run is known to the directory of a run that was trained with track.mlflow=true, and"
            f" {run_directory} has no {MLFLOW_FILE}; correct the directory, or leave out --mlflow."
        )
    return _read(record)


def _read(record: Path) -> MlflowRun:
    try:
        found = mapping_from_json(read_bounded(record))
        uri, run_id, timeout_s = found["tracking_uri"], found["run_id"], found["timeout_s"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{record} must say where the run is recorded ({error!r}); restore or delete it.") from None
    if not (isinstance(uri, str) and isinstance(run_id, str) and type(timeout_s) in (int, float)):
        raise DataError(f"{record} must say where the run is recorded, and holds {found}; restore or delete it.")
    return MlflowRun(uri, run_id, timeout_s)


def log_metrics(run: MlflowRun, step: int, metrics: Mapping[str, float]) -> None:
    """Add metric values to a run that may have ended long ago.

    Raises:
        TrackingError: the server does not answer, or no longer knows the run.
    """
    with _answers(run.tracking_uri, run.timeout_s) as client:
        for name, value in metrics.items():
            client.log_metric(run.run_id, name, value, step=step)


class SweepRecord:
    """A sweep as a parent run with a nested child for each trial, so that the UI compares and sorts the trials.

    A dead server is reported once and stops nothing: what it missed is sent when the sweep is opened again.
    """

    def __init__(self, parent: MlflowRun) -> None:
        """Find the children that there are.

        Raises:
            TrackingError: the server does not answer, or no longer knows the parent.
        """
        self.parent, self._warned = parent, False
        self._children: dict[str, tuple[str, int]] = {}
        with _answers(parent.tracking_uri, parent.timeout_s) as client:
            self._experiment_id = client.get_run(parent.run_id).info.experiment_id
            children, token = f"tags.`mlflow.parentRunId` = '{parent.run_id}'", None
            while token != "":
                page = client.search_runs([self._experiment_id], children, max_results=1000, page_token=token)
                for run in page:
                    tags = run.data.tags
                    if "eqm_dist.trial" in tags:  # otherwise a training that keeps its record itself
                        self._children[tags["eqm_dist.trial"]] = run.info.run_id, int(tags.get(_STEP_TAG, -1))
                token = page.token or ""

    def log_trial(
        self,
        trial: str,
        name: str,
        params: Mapping[str, Any],
        metrics: Mapping[str, float],
        step: int,
        failure: str | None,
    ) -> None:
        """What a trial gave.

        Args:
            trial: names the child for good.
            name: of the child in the UI.
            params: of the trial.
            metrics: figures by name.
            step: their step; what is not later than what was logged is not logged again.
            failure: why there are no figures, or None.
        """
        from mlflow.entities import Metric, Param, RunTag

        run_id, known = self._children.get(trial, (None, -1))
        if step <= known:
            return
        with self._without_raising() as client:
            tags = {"mlflow.parentRunId": self.parent.run_id, "mlflow.runName": name, "eqm_dist.trial": trial,
                    "mlflow.user": getpass.getuser()}  # fmt: skip
            run_id = run_id or client.create_run(self._experiment_id, tags=tags).info.run_id
            self._children[trial] = run_id, known
            now = time.time_ns() // 1_000_000
            client.log_batch(
                run_id,
                [Metric(key, value, now, step) for key, value in metrics.items()],
                [Param(key, str(value)[:_PARAM_LIMIT]) for key, value in params.items()],
                [RunTag(_STEP_TAG, str(step)), *([RunTag("eqm_dist.failure", failure)] if failure else [])],
            )
            client.set_terminated(run_id, "FINISHED" if failure is None else "FAILED")
            self._children[trial] = run_id, step

    def close_trial(self, run: MlflowRun, status: str, tags: Mapping[str, str] | None = None) -> None:
        """Give the run of a training its final status, unless it has it, or is recorded at another place; and tags."""
        if run.tracking_uri != self.parent.tracking_uri:
            return
        with self._without_raising() as client:
            for key, value in (tags or {}).items():
                client.set_tag(run.run_id, key, value)
            if client.get_run(run.run_id).info.status != status:
                client.set_terminated(run.run_id, status)

    def log_seed(self, trial: str, seed: int, fid: float) -> None:
        """The FID of a trial with another seed, as the metric ``eval/fid_by_seed`` over seeds; once for each."""
        key = "eval/fid_by_seed"
        if trial not in self._children:  # it was missed; the results have it
            return
        run_id, _ = self._children[trial]
        with self._without_raising() as client:
            if seed not in {point.step for point in client.get_metric_history(run_id, key)}:
                client.log_metric(run_id, key, fid, step=seed)

    def finish(self, files: Iterable[Path], metrics: Mapping[str, float], status: str, report: str = "") -> None:
        """Leave the parent with its files, the figures of the best trial, a final status and the report.

        The report is the run's description in the UI.
        """
        with self._without_raising() as client:
            for file in files:
                client.log_artifact(self.parent.run_id, str(file))
            for key, value in metrics.items():
                client.log_metric(self.parent.run_id, key, value)
            if report:
                client.set_tag(self.parent.run_id, "mlflow.note.content", f"```\n{report.strip()}\n```")
            client.set_terminated(self.parent.run_id, status)

    @contextmanager
    def _without_raising(self) -> Iterator[Any]:
        try:
            with _answers(self.parent.tracking_uri, self.parent.timeout_s) as client:
                yield client
        except TrackingError as error:
            if not self._warned:
                logger.warning("warning: %s The sweep goes on; run it again to send what is missed.", error)
            self._warned = True


class MlflowTracker:
    """Logs metrics and pictures in the background; training never waits for the server.

    While the server is away, what it missed is kept and sent again; the log says when it goes and when it is back. A
    step that an earlier attempt has sent already is not sent twice. Where the run was deleted, nothing more is sent.
    """

    def __init__(
        self, run: MlflowRun, earlier: Iterable[Mapping[str, Any]] = (), tags: Mapping[str, str] | None = None
    ) -> None:
        """Begin where the record ends.

        Args:
            run: where to log.
            earlier: the lines of metrics.jsonl; what a killed attempt wrote there but had not sent is sent now.
            tags: of the run from here on, which go with the first metrics.
        """
        self._run = run
        self._tags = dict(tags or {})
        self._last_sent: dict[str, int] = {}
        self._jobs: queue.SimpleQueue[Callable[[Any], None] | None] = queue.SimpleQueue()
        for line in earlier:
            self.log(line["step"], {key: value for key, value in line.items() if key != "step"})
        self._thread = threading.Thread(target=self._send, name="mlflow-tracker", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queue metric values of a step."""
        now = time.time_ns() // 1_000_000
        self._jobs.put(lambda client: self._send_metrics(client, now, step, dict(metrics)))

    def log_image(self, step: int, key: str, path: Path) -> None:
        """Queue a picture; the UI shows pictures of one key as a series over steps."""
        from PIL import Image

        with Image.open(path) as image:
            picture = image.convert("RGB")
        self._jobs.put(lambda client: client.log_image(self._run.run_id, picture, key=key, step=step))

    def go_back(self, step: int) -> None:
        """Nothing: a store cannot forget. Steps that are done again keep the values they were first given."""

    def finish(self) -> None:
        """Send what is queued, waiting at most a minute for a server that is away."""
        self._jobs.put(None)
        self._thread.join(timeout=60)
        if self._thread.is_alive():
            logger.warning("warning: MLflow did not take the last metrics; metrics.jsonl has them all.")

    def _send(self) -> None:
        job = self._jobs.get()  # before anything of MLflow is imported: the first step does not wait for that
        monitor = self._start_system_metrics()
        away = False
        while job is not None:
            while True:
                try:
                    with _answers(self._run.tracking_uri, self._run.timeout_s) as client:
                        job(client)
                except ForgottenError as error:
                    logger.warning("warning: %s The run goes on without it; metrics.jsonl has everything.", error)
                    monitor.finish()
                    return
                except TrackingError as error:
                    if not away:
                        logger.warning("warning: %s Training goes on; what is missed is sent later.", error)
                    away = True
                    time.sleep(2)
                    continue
                if away:
                    logger.info("MLflow answers again, and has what it missed")
                away = False
                break
            job = self._jobs.get()
        monitor.finish()

    def _start_system_metrics(self) -> Any:
        """Use of CPU, memory, disk, network and GPUs of rank 0's machine, every ten seconds."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(
            self._run.run_id, resume_logging=True, tracking_uri=_as_mlflow_takes_it(self._run.tracking_uri)
        )
        monitor.start()
        return monitor

    def _send_metrics(self, client: Any, timestamp_ms: int, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        for tag, value in self._tags.items():
            client.set_tag(self._run.run_id, tag, value)
        self._tags = {}
        new = []
        for key, value in metrics.items():
            if key not in self._last_sent:
                history = client.get_metric_history(self._run.run_id, key)
                self._last_sent[key] = max((point.step for point in history), default=-1)
            if step > self._last_sent[key]:
                new.append(Metric(key, value, timestamp_ms, step))
        if new:
            client.log_batch(self._run.run_id, metrics=new)
        self._last_sent |= {metric.key: step for metric in new}


def _experiment_id(client: Any, name: str, root: Path, tracking_uri: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    # A server knows where its artifacts go; a bare store would put them below the current directory.
    location = None if tracking_uri.startswith("http") else (root / "mlflow-artifacts").as_uri()
    # Without the kind the UI opens in its view for language models.
    return client.create_experiment(
        name, artifact_location=location, tags={"mlflow.experimentKind": "custom_model_development"}
    )


@contextmanager
def _answers(tracking_uri: str, timeout_s: float) -> Iterator[Any]:
    """A client of the store, with every failure as one sentence."""
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(max(1, round(timeout_s)))
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"  # each would wait as long again
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    # It narrates the making of its tables and prints whole statements of SQL; what fails is raised, and said once here.
    logging.getLogger("mlflow").setLevel(logging.CRITICAL)
    logging.getLogger("alembic").setLevel(logging.CRITICAL)
    try:
        with _alone(tracking_uri, timeout_s):
            client = MlflowClient(_as_mlflow_takes_it(tracking_uri))
        yield client
    except ForgottenError as error:
        raise ForgottenError(f"{tracking_uri} {error}") from error
    except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:
        if _deleted(error) or getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST":
            raise ForgottenError(f"{tracking_uri} answers, but what is recorded there was deleted: {error}.") from error
        if "database schema" in str(error):
            raise TrackingError(
                f"The MLflow store {tracking_uri} must be of this release of MLflow, and is of another; copy it and run"
                f" `mlflow db upgrade {tracking_uri}`, or name another --track.mlflow_uri."
            ) from error
        raise TrackingError(
            f"The MLflow store {tracking_uri} must answer, but it did not ({_root_cause(error)}); "
            "start the server, correct --track.mlflow_uri, or use --track.mlflow false."
        ) from error


@contextmanager
def _forgotten(what: str, remedy: str) -> Iterator[None]:
    """Say of something that was deleted in MLflow how to go on."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if _deleted(error):
            raise ForgottenError(
                f"answers, but the {what} was deleted there; restore it there, or {remedy}."
            ) from error
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            raise ForgottenError(
                f"answers, but does not know the {what}; name the right store, or {remedy}."
            ) from error
        raise


def _deleted(error: Exception) -> bool:
    """MLflow has no code of its own for what lies in its trash."""
    return "must be in the 'active' state" in str(error)


@contextmanager
def _alone(tracking_uri: str, timeout_s: float) -> Iterator[None]:
    """Let one process at a time open a store in a file: of two that make its tables, one would fail."""
    file = _store_file(tracking_uri)
    if file is None or tracking_uri in _OPENED:
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)  # as MLflow does
    with ExitStack() as held:
        try:
            held.enter_context(locked(file.with_name(f"{file.name}.lock"), wait_s=timeout_s))
        except StorageError as error:
            logger.warning("warning: %s Until then two runs must not make the tables of one store at once.", error)
        except BusyError as error:
            raise TrackingError(f"The MLflow store {tracking_uri} is being opened: {error}") from None
        yield
    _OPENED.add(tracking_uri)


def _store_file(tracking_uri: str) -> Path | None:
    """Where a store in a file lies; None for a server, or a store in memory."""
    from sqlalchemy import make_url

    found = make_url(tracking_uri).database if tracking_uri.startswith("sqlite") else None
    return Path(found) if found not in (None, "", ":memory:") else None


def _as_mlflow_takes_it(tracking_uri: str) -> str:
    """The store, in words from which MLflow makes no directory: it would take %25 for the name of one."""
    return tracking_uri.replace("sqlite:", "sqlite+pysqlite:", 1) if "%" in tracking_uri else tracking_uri


def _root_cause(error: BaseException) -> str:
    """What lies under the layers of HTTP and database clients: "Connection refused", "file is not a database"."""
    cause = error.__cause__ or error.__context__
    while cause is not None and not isinstance(cause, LookupError):
        error, cause = cause, cause.__cause__ or cause.__context__
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
