"""The table of docs/chaos.md, from the results of ``chaos``."""

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

HEADER = (
    "what happened",
    "to the next step",
    "steps done again",
    "losses, EMA weights",
    "MLflow",
    "what the user read",
)


def render(results: Mapping[str, Any]) -> str:
    """Markdown: a row for every scenario, then hardware, commits and versions."""
    rows = [_row(outcome) for outcome in results["scenarios"].values()]
    lines = [_line(HEADER), _line(["---"] * len(HEADER)), *map(_line, rows)]
    hardware, versions = results["hardware"], results["versions"]
    commits = ", ".join(sorted({outcome["commit"][:12] for outcome in results["scenarios"].values()}))
    made_with = (
        f"{hardware['cores']} cores ({hardware['machine']}) for all hosts, no GPU; Ray {versions['ray']},"
        f" torch {versions['torch']}, DeepSpeed {versions['deepspeed']}; {results['date']}, commits {commits}."
    )
    return "\n".join([*lines, "", made_with])


def _row(outcome: Mapping[str, Any]) -> Sequence[str]:
    return (
        outcome["what"] + ("" if not outcome["problems"] else f" **failed: {'; '.join(outcome['problems'])}**"),
        _next_step(outcome),
        str(outcome["steps_lost"]),
        _difference(outcome["difference"]),
        "one run, each step once" if not outcome["problems"] else str(outcome["mlflow"]),
        _told(outcome["told"]),
    )


def _next_step(outcome: Mapping[str, Any]) -> str:
    seconds, pause = outcome["seconds_to_next_step"], outcome["longest_pause_s"]
    if not outcome["restarts"]:
        return f"no restart; longest pause {pause:.1f} s"
    if len(seconds) > 1:
        goodput = f"goodput {outcome['goodput']:.0%}"
        if (counted := outcome["counters"].get("run/goodput")) is not None:
            goodput += f", by the run's own count {counted:.0%}"
        return f"{statistics.median(seconds):.1f} s (median), {max(seconds):.1f} s (longest); {goodput}"
    return f"{seconds[0]:.1f} s" + (f"; pause {pause:.1f} s" if pause < seconds[0] - 5 else "")


def _difference(differences: Mapping[str, float | None]) -> str:
    if None in differences.values():
        return "not all there"
    if not any(differences.values()):
        return "the same, bit for bit"
    return (
        f"losses the same up to {differences['losses soon after']:.0e} at first, {differences['losses']:.0e} in the end"
    )


def _told(lines: Sequence[str]) -> str:
    """Each kind of line once, without times and the tail of the run's name; lines of a kind differ in numbers only."""
    kinds: dict[str, list[str]] = {}
    for line in lines:
        text = re.sub(r"(?<=[a-z])-\d{6}\b", "", re.sub(r"^\d\d:\d\d:\d\d ", "", line))
        kinds.setdefault(re.sub(r"\d[\d,]*", "0", text), []).append(text)
    shown = [f"`{same[0]}`" + (f" ({len(same)} times)" if len(same) > 1 else "") for same in kinds.values()]
    return "<br>".join(shown) or "nothing"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
