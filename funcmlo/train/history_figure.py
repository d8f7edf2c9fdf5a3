"""The figure of a run's history."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from funcmlo.errors import DefinitionError

if TYPE_CHECKING:
    from pandas import DataFrame

_PANELS: dict[str, Callable[[str], bool]] = {
    "cost": lambda name: name.endswith("/cost"),
    "gradient norm": lambda name: name.endswith(("/gradient_norm", "/hypergradient_norm")),
    "residual of the response": lambda name: name.endswith("/residual"),
}
_STYLES = ["-", "--", ":", "-.", (0, (5, 1)), (0, (3, 1, 1, 1))]
_DECADES = 20.0
"""How far apart positive values are for a logarithmic axis."""


def figure(frame: DataFrame) -> Any:
    """Return a figure of a history: a panel each for costs, gradient norms, residuals and other numbers.

    Args:
        frame: the history.

    Returns:
        A matplotlib figure, its panels side by side; lines are told apart without colours.

    Raises:
        DefinitionError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DefinitionError("history.figure() needs matplotlib: pip install 'funcmlo[compare]'") from error
    panels = {title: [name for name in frame if mine(name)] for title, mine in _PANELS.items()}
    levels = {name.split("/")[0] for name in panels["cost"]}
    plain = [name for name in frame if name not in ("seconds", "memory", "skipped")]
    others = [name for name in plain if name.split("/")[0] not in levels]
    groups = dict.fromkeys(name.split("/")[0] for name in others)
    panels |= {group: [name for name in others if name.split("/")[0] == group] for group in groups}
    shown = {title: names for title, names in panels.items() if names and frame[names].notna().any(axis=None)}
    drawn: Any = Figure(figsize=(4.0 * max(len(shown), 1), 3.2), layout="constrained")
    axes = drawn.subplots(1, max(len(shown), 1), squeeze=False)[0]
    for axis, (title, names) in zip(axes, shown.items(), strict=False):
        _panel(axis, title, frame[names])
    if not shown:
        axes[0].set_axis_off()
        axes[0].text(0.5, 0.5, "no steps were made", ha="center")
    return drawn


def _panel(axis: Any, title: str, columns: DataFrame) -> None:
    """Draw some columns against the step."""
    for i, name in enumerate(columns):
        values = columns[name].dropna()
        marker = "o" if len(values) < 30 else None
        shade = str(0.55 * (i % 3) / 2)
        label = name.removesuffix("/cost").removesuffix("/gradient_norm").removesuffix("/hypergradient_norm")
        axis.plot(
            values.index, values, linestyle=_STYLES[i % len(_STYLES)], color=shade, marker=marker, markersize=3, label=label
        )
    finite = columns.to_numpy()[columns.notna().to_numpy()]
    if len(finite) and finite.min() > 0 and finite.max() > _DECADES * finite.min():
        axis.set_yscale("log")
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("outer step")
    if columns.shape[1] > 1:
        axis.legend(fontsize=8, frameon=False)
    else:
        axis.set_ylabel(columns.columns[0])
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
