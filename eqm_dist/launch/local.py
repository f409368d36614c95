"""The run in this process alone, with the plain engine and without Ray."""

import torch

from eqm_dist.build import OpenRun, build_run
from eqm_dist.launch.worker import run_to_end
from eqm_dist.logs import log_file, setup_logging


def train(opened: OpenRun) -> None:
    """Train to the last step."""
    setup_logging(log_file(opened.directory, 0))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run_to_end(opened, build_run(opened, device))
