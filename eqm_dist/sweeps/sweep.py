"""What every sweep does, in this order. What a kind of sweep does in its own way, it hands over as a ``Sweep``."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from eqm_dist.errors import LaunchError
from eqm_dist.launch.termination import ending_at_sigterm
from eqm_dist.runs import in_ray_job
from eqm_dist.storage.lease import hold
from eqm_dist.sweeps.deadline import Deadline
from eqm_dist.sweeps.ledger import Ledger
from eqm_dist.sweeps.record import Record
from eqm_dist.sweeps.report import place, title
from eqm_dist.sweeps.search import Search
from eqm_dist.track.mlflow import SweepRecord

logger = logging.getLogger(__name__)

R = TypeVar("R")


@dataclass(frozen=True)
class Findings:
    """What a sweep has found.

    Attributes:
        lines: of the closing report, below its title.
        files: that were written.
        best: figures of the best point.
        failure: a sentence, where no point of a whole sweep gave an FID.
    """

    lines: Sequence[str] = ()
    files: Sequence[Path] = ()
    best: Mapping[str, float] = field(default_factory=dict[str, float])
    failure: str | None = None


@dataclass(frozen=True)
class Sweep(Generic[R]):
    """A kind of sweep.

    Attributes:
        search: what is searched.
        settings: what decides the results, besides the search.
        kind: the dataclass of a result.
        record: how the sweep is recorded in MLflow.
        log: brings a result into that record; one that is there already changes nothing.
        work: tries what the ledger does not have, until the deadline; whether all is done.
        conclude: makes files and the report of the results.
        may_change: settings that may be others when it goes on, besides those of the search that may.
    """

    search: Search
    settings: Mapping[str, Any]
    kind: type[R]
    record: Record
    log: Callable[[SweepRecord, R], None]
    work: Callable[[Ledger[R], Deadline, SweepRecord | None], bool]
    conclude: Callable[[Sequence[R]], Findings]
    may_change: Sequence[str] = ()


def run_sweep(sweep: Sweep[R], hours: float | None) -> str:
    """Do all of a sweep, or go on with one that was begun; returns the closing report.

    Args:
        sweep: what is done.
        hours: nothing is begun after so long; None sets no limit.

    Raises:
        BusyError: another process does the same sweep.
        LaunchError: no point gave an FID.
        Terminated: the process was asked to end; the same command goes on.
        EqmDistError: one sentence for the user.
    """
    with (
        ending_at_sigterm(),
        hold(sweep.search.out, f"The sweep in {sweep.search.out}", "give another --out"),
    ):
        return _run(sweep, Deadline(hours))


def _run(sweep: Sweep[R], deadline: Deadline) -> str:
    search = sweep.search
    ledger = Ledger(
        search.out,
        {**sweep.settings, **search.settings},
        sweep.kind,
        lambda key, before: key in sweep.may_change or search.may_change(key, before),
    )
    record = sweep.record.open(search)
    if in_ray_job():
        logger.info("The results lie in %s; they stay there when the job is over", place(search.out))
    status, found, report = "FAILED", Findings(), ""
    try:
        if record is not None:
            ledger.follow(partial(sweep.log, record))  # also what a killed attempt may not have sent
        complete = sweep.work(ledger, deadline, record)
        found = sweep.conclude(ledger.results)
        if complete and found.failure is not None:
            raise LaunchError(found.failure)
        status = "FINISHED" if complete else "KILLED"
        report = "\n".join(["", title(search.out, complete), "", *found.lines])
        return report
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        if record is not None:
            record.finish(found.files, found.best, status, report)
