"""The run in this process alone, with the plain engine and without Ray."""

from contextlib import nullcontext
from dataclasses import replace

import torch

from eqm_dist.build import OpenRun, build_run
from eqm_dist.launch.interrupt import Interrupt
from eqm_dist.launch.worker import run_to_end
from eqm_dist.logs import log_file, setup_logging


def train(opened: OpenRun) -> None:
    """Train to the last step.

    Raises:
        KeyboardInterrupt: the user, or the system, has ended the run, which is saved.
    """
    if opened.reports:
        opened.reports.fetch()
    setup_logging(log_file(opened.directory, 0))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with Interrupt() as interrupt, opened.reports or nullcontext():
        run_to_end(opened, replace(build_run(opened, device), must_stop=lambda reported: interrupt.asked))
    interrupt.check()
