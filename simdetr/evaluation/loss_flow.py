"""Which loss falls first? A class loss and a localisation loss in, their way down under three total losses out.

If training pushed the class loss u and the localisation loss v straight down the gradient of the total loss, the point
(u, v) would flow along (u', v') = -(∂/∂u, ∂/∂v) of

- equation 5: u + v, both fall alike;
- equation 6: u + exp(-u)·v, the localisation loss weighs as much as the true class is probable;
- equation 7: u + exp(-u)·v².

No network is trained here; real losses are not free to move like this. A loss that has come to 0 stays there.
Source: seed 004, equations 5 to 7 and figures 11A to 11C, whose vertical axis is the class loss; heads, section 1.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray
from scipy.integrate import solve_ivp

from simdetr.evaluation.learning_curves import INK, LINE_COLOURS, new_figure, style_panel

Equation = Literal["eq5", "eq6", "eq7"]
TITLES: dict[Equation, str] = {"eq5": "5: u + v", "eq6": "6: u + exp(-u)·v", "eq7": "7: u + exp(-u)·v²"}
BORDERS = ("above it the class loss falls faster", "below it the class loss rises")
STARTS = ((1.0, 1.0), (3.0, 1.0), (3.0, 2.0), (3.0, 3.0), (1.5, 3.0), (0.5, 2.0))
LONGEST = 1e4  # time after which a loss that has not halved counts as one that never does


def gradient(u: ArrayLike, v: ArrayLike, equation: Equation) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Derivatives of the total loss by the class loss u and the localisation loss v, of their common shape.

    Raises:
        ValueError: an unknown equation.
    """
    u, v = np.broadcast_arrays(np.asarray(u, np.float64), np.asarray(v, np.float64))
    if equation == "eq5":
        return np.ones_like(u), np.ones_like(v)
    weight = np.exp(-u)
    if equation == "eq6":
        return 1 - weight * v, weight
    if equation == "eq7":
        return 1 - weight * v**2, 2 * weight * v
    raise ValueError(f"equation: expected one of {', '.join(TITLES)}, got {equation!r}")


def flow(start: tuple[float, float], equation: Equation, times: ArrayLike) -> NDArray[np.float64]:
    """Where the losses are at some times.

    Args:
        start: (u, v) at time 0, not negative.
        equation: of the total loss.
        times: float [T], ascending from 0 on.

    Returns:
        float64 [T, 2], (u, v).

    Raises:
        ValueError: a negative start, times that fall or are negative, or an unknown equation.
    """
    moments = np.asarray(times, np.float64)
    if moments.ndim != 1 or not len(moments) or moments[0] < 0 or (np.diff(moments) < 0).any():
        raise ValueError(f"times: expected ascending numbers from 0 on, got {moments.tolist()}")
    _check_start(start)
    if moments[-1] == 0:
        return np.tile(np.asarray(start, np.float64), (len(moments), 1))
    solution = solve_ivp(_velocity(equation), (0, moments[-1]), start, t_eval=moments, rtol=1e-8, atol=1e-10)
    return np.maximum(solution.y.T, 0)


def half_times(start: tuple[float, float], equation: Equation) -> tuple[float, float]:
    """When u and when v come to half of their start, ``inf`` for one that never does.

    Raises:
        ValueError: a start that is not positive, or an unknown equation.
    """
    _check_start(start)
    if min(start) == 0:
        raise ValueError(f"start: expected two losses above 0, which can be halved, got {start}")
    return _half_time(start, equation, 0), _half_time(start, equation, 1)


def draw_flow(starts: Sequence[tuple[float, float]] = STARTS, longest: float = 6.0) -> Figure:
    """The figure: a panel per equation with the ways down from some starts, v to the right and u upwards.

    Equation 5 has no border where another loss begins to fall faster.

    Args:
        starts: (u, v) of the ways, drawn as dots.
        longest: time that is drawn.
    """
    figure = new_figure(len(TITLES))
    limit = 1.1 * max(map(max, starts))
    for axes, equation in zip(figure.subplots(1, len(TITLES)), TITLES, strict=True):
        for index, start in enumerate(starts):
            way = flow(start, equation, np.linspace(0, longest, 400))
            colour = LINE_COLOURS[index % len(LINE_COLOURS)]
            axes.plot(way[:, 1], way[:, 0], color=colour, linewidth=1.6)
            axes.plot(start[1], start[0], color=colour, marker="o", markersize=3.5)
        _draw_borders(axes, equation, limit)
        style_panel(axes, f"equation {TITLES[equation]}", "localisation loss v")
        axes.set_ylabel("class loss u", color=INK, fontsize=9)
        axes.set(xlim=(0, limit), ylim=(0, limit), aspect="equal")
    lines = figure.axes[-1].get_lines()[-2:]
    figure.legend(lines, BORDERS, loc="outside lower center", ncols=2, fontsize=8, frameon=False, labelcolor=INK)
    return figure


def class_first_border(v: ArrayLike, equation: Equation) -> NDArray[np.float64]:
    """The class loss above which it falls faster than the localisation loss v; infinite for equation 5: never.

    Raises:
        ValueError: an unknown equation.
    """
    values = np.asarray(v, np.float64)
    slope = gradient(0.0, values, equation)[1]  # of v at u = 0; the border is where exp(-u) brings both to the same
    if equation == "eq5":
        return np.full(values.shape, np.inf)
    return np.log(slope + (values if equation == "eq6" else values**2))


def _half_time(start: tuple[float, float], equation: Equation, row: int) -> float:
    def above_half(_: float, losses: NDArray[np.float64]) -> float:
        return float(losses[row]) - start[row] / 2

    above_half.terminal = True  # type: ignore[attr-defined]  # so solve_ivp is told to stop there
    solution = solve_ivp(_velocity(equation), (0, LONGEST), start, events=above_half, rtol=1e-8, atol=1e-10)
    return float(solution.t[-1]) if solution.status == 1 else math.inf


def _velocity(equation: Equation) -> Callable[[float, NDArray[np.float64]], list[float]]:
    """How fast both losses change at a time, as `solve_ivp` asks for it."""

    def velocity(_: float, losses: NDArray[np.float64]) -> list[float]:
        down = [-float(slope) for slope in gradient(losses[0], losses[1], equation)]
        return [0.0 if loss <= 0 and speed < 0 else speed for loss, speed in zip(losses, down, strict=True)]

    return velocity


def _check_start(start: tuple[float, float]) -> None:
    if len(start) != 2 or not all(loss >= 0 and math.isfinite(loss) for loss in start):
        raise ValueError(f"start: expected finite (u, v) of at least 0, got {start}")


def _draw_borders(axes: Axes, equation: Equation, limit: float) -> None:
    v = np.linspace(1e-3, limit, 200)
    if equation != "eq5":
        axes.plot(v, class_first_border(v, equation), color=INK, linewidth=1, linestyle="--")
        axes.plot(v, np.log(v) * (1 if equation == "eq6" else 2), color=INK, linewidth=1, linestyle=":")
