"""Many short trainings: the sweep of ``tuning/sweep_decay.py``. A trial is a run in OUT/runs."""
