"""The table of docs/chaos.md, from the results of ``chaos``."""

from collections.abc import Mapping, Sequence
from typing import Any

HEADER = ("what happened", "to the next step", "steps done again", "losses", "MLflow", "what the user read")


def render(results: Mapping[str, Any]) -> str:
    """Markdown: a row for every scenario, then hardware, commits and versions."""
    rows = [_row(outcome) for outcome in results["scenarios"].values()]
    lines = [_line(HEADER), _line(["---"] * len(HEADER)), *map(_line, rows)]
    hardware, versions = results["hardware"], results["versions"]
    commits = ", ".join(sorted({outcome["commit"][:12] for outcome in results["scenarios"].values()}))
    made_with = (
        f"{hardware['cores']} cores ({hardware['machine']}) for all hosts, no GPU; Ray {versions['ray']},"
        f" torch {versions['torch']}, DeepSpeed {versions['deepspeed']}; {results['date']}, commit {commits}."
    )
    return "\n".join([*lines, "", made_with])


def _row(outcome: Mapping[str, Any]) -> Sequence[str]:
    seconds = outcome["seconds_to_next_step"]
    told = "<br>".join(f"`{line}`" for line in outcome["told"]) or "nothing"
    return (
        outcome["what"] + ("" if not outcome["problems"] else f" **failed: {'; '.join(outcome['problems'])}**"),
        f"{seconds:.1f} s" if outcome["restarts"] else f"no restart (longest pause {seconds:.1f} s)",
        str(outcome["steps_lost"]),
        "the same, bit for bit" if outcome["difference"] == 0 else f"the same up to {outcome['difference']:.1g}",
        "one run, each step once" if not outcome["problems"] else str(outcome["mlflow"]),
        told,
    )


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
