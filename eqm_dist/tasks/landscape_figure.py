"""Pictures of landscapes: a figure of fields, trajectories and samples, and an animation of the descent."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from eqm_dist.tasks.landscape import NFE, Landscape, Method

TITLES: dict[Method, str] = {
    "flow_matching": "Flow matching\nvelocity at the end, gamma = 1",
    "eqm": "Equilibrium Matching\none field, at rest on the data",
    "eqm_energy": "EqM-E\nan explicit energy",
}
EXTENT = 2.7
"""Half of the side of the square that is shown."""
INK, PAPER, DATA, SAMPLE, TRAJECTORY = "#1b1f24", "#ffffff", "#c3c9d1", "#d1495b", "#f4d35e"


@dataclass(frozen=True)
class Descent:
    """What a method did.

    Attributes:
        landscape: the method.
        trajectories: trajectories [nfe + 1, B, 2].
        distance: energy distance between its samples and data.
    """

    landscape: Landscape
    trajectories: Tensor
    distance: float


def figure(descents: Sequence[Descent], data: Tensor) -> bytes:
    """PNG: above, each method's field with trajectories; below, its samples over the data [n, 2]."""
    page = Figure(figsize=(3.4 * len(descents), 7.1), dpi=110, layout="constrained", facecolor=PAPER)
    axes = page.subplots(2, len(descents), squeeze=False)
    for descent, field_axis, sample_axis in zip(descents, axes[0], axes[1], strict=True):
        _draw_field(field_axis, descent.landscape)
        for trajectory in descent.trajectories[:, :24].unbind(1):
            field_axis.plot(*trajectory.T, color=TRAJECTORY, linewidth=0.9)
        field_axis.plot(*descent.trajectories[0, :24].T, ".", color=PAPER, markersize=3)
        field_axis.plot(*descent.trajectories[-1, :24].T, ".", color=SAMPLE, markersize=5)
        field_axis.set_title(TITLES[descent.landscape.method], fontsize=10, color=INK)
        sample_axis.plot(*data.T, ".", color=DATA, markersize=2)
        sample_axis.plot(*descent.trajectories[-1].T, ".", color=SAMPLE, markersize=2)
        sample_axis.set_xlabel(
            f"{descent.trajectories.shape[1]:,} samples over data, {NFE} NFE\nenergy distance {descent.distance:.3f}",
            fontsize=9,
            color=INK,
        )
    for axis in axes.flat:
        _frame(axis)
    return _png(page)


def animation(descents: Sequence[Descent], frames: int = 36, side: int = 230) -> bytes:
    """GIF that loops: the samples move over each method's field, which for flow matching changes on the way.

    Args:
        descents: the methods.
        frames: pictures of the motion; the last one stays for two seconds.
        side: pixels of one panel.
    """
    pictures = []
    for frame in range(frames):
        done = frame / (frames - 1)
        page = Figure(figsize=(len(descents), 1.16), dpi=side, facecolor=PAPER)
        axes = page.subplots(1, len(descents), squeeze=False)[0]
        page.subplots_adjust(left=0.005, right=0.995, bottom=0.01, top=0.86, wspace=0.02)
        for descent, axis in zip(descents, axes, strict=True):
            _draw_field(axis, descent.landscape, gamma=done, arrows=False)
            here = descent.trajectories[round(done * (len(descent.trajectories) - 1)), :400]
            axis.plot(*here.T, ".", color=PAPER, markersize=1.5, markeredgewidth=0)
            axis.set_title(TITLES[descent.landscape.method].split("\n")[0], fontsize=4.5, pad=2, color=INK)
            _frame(axis)
        pictures.append(Image.open(io.BytesIO(_png(page))).convert("RGB"))
    # One palette for all frames, so that colours do not flicker.
    palette = pictures[-1].quantize(64, dither=Image.Dither.NONE)
    indexed = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    content = io.BytesIO()
    durations = [70] * (frames - 1) + [2000]
    indexed[0].save(content, "GIF", save_all=True, append_images=indexed[1:], duration=durations, loop=0, optimize=True)
    return content.getvalue()


def _draw_field(axis: Any, landscape: Landscape, gamma: float = 1.0, arrows: bool = True) -> None:
    """The energy, or the length of a field that has none, as colours; the direction as arrows."""
    grid = torch.linspace(-EXTENT, EXTENT, 81)
    rows, columns = torch.meshgrid(grid, grid, indexing="ij")
    points = torch.stack([columns.flatten(), rows.flatten()], dim=1)
    with torch.no_grad():
        field = landscape.at(points, gamma)
        explicit = landscape.method == "eqm_energy"
        height = landscape.energy(points) if explicit else field.norm(dim=1)
    if explicit:
        # By rank: between two lines lies the same area, or the walls far outside would take all colours.
        height = height.argsort().argsort() / len(height)
    shown = height.clamp(max=height.quantile(0.97).item()).reshape(rows.shape).numpy()
    square = (-EXTENT, EXTENT, -EXTENT, EXTENT)
    axis.imshow(
        shown, extent=square, origin="lower", cmap="viridis" if explicit else "cividis", interpolation="bilinear"
    )
    if explicit:
        axis.contour(grid.numpy(), grid.numpy(), shown, levels=24, colors=PAPER, linewidths=0.3, alpha=0.6)
    elif arrows:
        thin = (slice(None, None, 5), slice(None, None, 5))
        directions = field.reshape(*rows.shape, 2)[thin]
        lengths = directions.norm(dim=2).clamp(min=1e-9)
        scaled = directions / lengths[..., None] * lengths.clamp(max=1.0)[..., None]
        axis.quiver(
            columns[thin].numpy(),
            rows[thin].numpy(),
            scaled[..., 0].numpy(),
            scaled[..., 1].numpy(),
            color=PAPER,
            alpha=0.55,
            scale=26,
            width=0.004,
        )


def _frame(axis: Any) -> None:
    axis.set(xlim=(-EXTENT, EXTENT), ylim=(-EXTENT, EXTENT), xticks=[], yticks=[], aspect="equal")
    for spine in axis.spines.values():
        spine.set_visible(False)


def _png(page: Figure) -> bytes:
    content = io.BytesIO()
    # Without the date and the version of matplotlib, the same picture is the same bytes.
    FigureCanvasAgg(page).print_png(content, metadata={"Software": None})
    return content.getvalue()
