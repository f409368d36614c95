"""Figures of an evaluation."""

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def nfe_histogram(nfe: Tensor) -> "Figure":
    """How many samples took how many evaluations of the field (paper, Figure 8).

    Args:
        nfe: [n] int64, n >= 1.
    """
    from matplotlib.figure import Figure  # most of a second, which no run has to wait for before its first step

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    low, high = int(nfe.min()), int(nfe.max())
    width = max(1, (high - low) // 50)  # whole numbers: a bin holds as many counts as any other
    axes.hist(nfe.cpu().numpy(), bins=[edge - 0.5 for edge in range(low, high + 1 + width, width)])
    mean = nfe.double().mean().item()
    axes.axvline(mean, color="black", linestyle="--", label=f"mean {mean:.1f}")
    axes.set_xlabel("evaluations of the field (NFE)")
    axes.set_ylabel(f"samples of {len(nfe):,}")
    axes.legend(frameon=False)
    return figure
