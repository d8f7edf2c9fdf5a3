"""The Taylor test: a gradient is right if the first-order remainder falls with the square of the step.

R(h) = |f(x + hv) − f(x) − h⟨g, v⟩| is h²/2 |⟨v, Hv⟩| + O(h³) for the gradient g, and h |⟨∇f − g, v⟩| + O(h²) for a
wrong one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.errors import EstimatorError, ParameterError
from funcmlo.operators import ravel, unravel
from funcmlo.testing.differences import along, noise_at, noises
from funcmlo.testing.subjects import Subject, check_tree, direction_like, is_plain, subject


@dataclass(frozen=True)
class TaylorTest:
    """What a Taylor test found; it is true exactly if the gradient passed.

    Attributes:
        passed: whether the remainders fall as a gradient's must, and no fault was seen.
        slope: the least slope of log R by log h over the directions, each at the smallest steps that rounding leaves; None
            where all remainders are rounding.
        fault: the estimated relative fault ‖g − ∇f‖ / ‖∇f‖, from differences along the directions.
        reason: a sentence.
        name: what was tested.
        steps: the steps h.
        remainders: for each direction, √(R(h)² + R(−h)²) at each step.
    """

    passed: bool
    slope: float | None
    fault: float
    reason: str
    name: str = ""
    steps: tuple[float, ...] = field(default=(), repr=False)
    remainders: tuple[tuple[float, ...], ...] = field(default=(), repr=False)

    def __bool__(self) -> bool:
        """Say whether the gradient passed."""
        return self.passed

    def check(self) -> TaylorTest:
        """Return the test, or raise if the gradient did not pass.

        Returns:
            Itself.

        Raises:
            EstimatorError: it did not; the message has the numbers.
        """
        if self.passed:
            return self
        worst = min(self.remainders, key=lambda r: r[0] / r[-1] if r[-1] else math.inf, default=())
        numbers = ", ".join(f"{h:.0e}: {r:.2e}" for h, r in zip(self.steps, worst, strict=False))
        raise EstimatorError(f"Taylor test of {self.name}: {self.reason} Remainders by step: {numbers}.")


def taylor_test(
    function: Any,
    /,
    *arguments: Any,
    gradient: Tree = None,
    directions: int = 3,
    seed: int = 0,
    raise_on_failure: bool = False,
    **keywords: Any,
) -> TaylorTest:
    """Hold a gradient against the function that it should be the gradient of.

    It is called as `finite_difference` is: `taylor_test(function, x)`, `taylor_test(program, state, batches, of="x")`,
    `taylor_test(solve, init, *inputs, batch=None, cotangent=None)`. Random directions v of norm max(1, ‖x‖) are taken, and
    steps from 10⁻¹ to 10⁻⁵. Remainders at v and −v are taken together, so that terms of second and third order cannot
    cancel. What is below a hundred times the function's own rounding is not judged. The slope must be at least 1.95; and
    since a large curvature hides small faults at these steps, ⟨g, v⟩ is held against extrapolated differences too, to
    a relative fault of 10⁻⁵. Where rounding would hide a fault of 3·10⁻⁴ the test does not pass, and says so.

    Args:
        function: a function of a tree, a program, or what `fm.argmin` or `fm.fixed_point` returned.
        *arguments: where. The gradient may follow the point of a plain function.
        gradient: what is tested, a tree like the point (for a program: what `hypergradient` returns); without it the
            library's own.
        directions: the number of directions.
        seed: decides them.
        raise_on_failure: whether a failed test raises.
        **keywords: `of`, `batch`, `cotangent`, and inputs by name.

    Returns:
        The test.

    Raises:
        EstimatorError: the gradient did not pass, with `raise_on_failure=True`; or nothing can be evaluated in float64.
        ParameterError: the arguments are not as expected.

    Example:
        >>> import torch, funcmlo as fm
        >>> bool(taylor_test(lambda x: torch.sin(x).sum(), torch.ones(3)))
        True
        >>> taylor_test(lambda x: torch.sin(x).sum(), torch.ones(3), 1.001 * torch.ones(3).cos()).passed
        False
    """
    if directions < 1:
        raise ParameterError(f"taylor_test: directions={directions}; expected at least 1.")
    if len(arguments) == 2 and gradient is None and is_plain(function):
        *arguments, gradient = arguments  # type: ignore[assignment]
    at = subject(function, *arguments, **keywords)
    given = at.library() if gradient is None else direction_like("the gradient", at.point, gradient)
    g = _tree.scale(at.sign, given)
    check_tree("the gradient", g)
    result = _judged(at, g, directions, seed)
    return result.check() if raise_on_failure else result


@dataclass(frozen=True)
class _Line:
    """What one direction of length one showed."""

    remainders: tuple[float, ...]
    slope: float | None
    sharp: float
    off: float
    error: float
    size: float


def _judged(at: Subject, g: Tree, directions: int, seed: int) -> TaylorTest:
    size = _tree.size(at.point)
    if not all(bool(torch.isfinite(leaf).all()) for leaf in _tree.leaves(g)) or not math.isfinite(at(at.point)):
        return TaylorTest(False, None, math.inf, "The function or the gradient is not finite.", at.name)
    if not size:
        return TaylorTest(True, None, 0.0, "There is nothing to differentiate by.", at.name)
    generator = torch.Generator().manual_seed(seed)
    length = max(1.0, float(_tree.norm(at.point)))
    lines = []
    for _ in range(directions):
        v = torch.randn(size, generator=generator, dtype=torch.float64)
        lines.append(_line(at, g, unravel(v * (length / v.norm()), at.point), length))
    # For random directions the mean of ⟨a, v/‖v‖⟩² is ‖a‖²/n.
    root = math.sqrt(size / directions)
    off, error, found = (root * math.hypot(*(getattr(line, name) for line in lines)) for name in ("off", "error", "size"))
    largest = float(ravel(g).abs().max()) or 1.0  # squares of 1e200 overflow
    whole = max(largest * float(torch.linalg.vector_norm(ravel(g) / largest)), found)
    if not all(map(math.isfinite, (whole, off, error))):
        return TaylorTest(False, None, math.inf, "Its numbers overflow float64: scale the function down.", at.name)
    fault = off / whole if whole else 0.0
    doubt = error / whole if whole else 0.0
    slopes = [line.slope for line in lines if line.slope is not None]
    slope = min(slopes, default=None)
    passed, reason = _verdict(slope, all(line.sharp <= _SHARP for line in lines), fault, doubt)
    return TaylorTest(passed, slope, fault, reason, at.name, STEPS, tuple(line.remainders for line in lines))


def _verdict(slope: float | None, sharp: bool, fault: float, doubt: float) -> tuple[bool, str]:
    """Say whether the gradient passes, and why."""
    if fault > FAULT + doubt:
        how = "" if slope is None else f"; the slope of the remainder is {slope:.3f}"
        return False, f"The gradient is off by about {fault:.1e} of its size{how}."
    if slope is not None and slope < SLOPE:
        return False, f"The remainder falls with a slope of {slope:.3f}, not 2: the gradient is off, or the function kinks."
    if doubt > _SEEN and not sharp:
        return False, (
            f"Noise in the function hides the answer: a relative fault below {doubt:.1e} would not be seen. Evaluate it in "
            "float64, and solve inner problems further."
        )
    if slope is None:
        return True, f"The remainders are at rounding level, and a relative fault of {max(FAULT, doubt):.1e} would be seen."
    return True, f"The remainder falls with a slope of {slope:.3f}."


def _line(at: Subject, g: Tree, v: Tree, length: float) -> _Line:
    """Look along one direction."""

    def phi(t: float) -> float:
        return at(_tree.add_scaled(at.point, t, v))

    zero, slope_there = phi(0.0), float(_tree.dot(g, v))
    noise = noises(lambda t: phi(t / length), zero, float(_tree.norm(at.point)))
    remainders, floors = [], []
    for h in STEPS:
        ends = [phi(h), phi(-h)]
        remainders.append(math.hypot(ends[0] - zero - h * slope_there, ends[1] - zero + h * slope_there))
        size = max(abs(zero), *map(abs, ends))
        floors.append(_ABOVE * max(noise_at(noise, h * length), 4 * 2.0**-52 * size))
    slope, sharp = _slope(remainders, floors)
    value, error = along(at, v, noise)
    return _Line(tuple(remainders), slope, sharp, abs(value - slope_there) / length, error / length, abs(value) / length)


def _slope(remainders: Sequence[float], floors: Sequence[float]) -> tuple[float | None, float]:
    """The slope at the smallest two neighbouring steps whose remainders are above their floors, and the smaller step."""
    for i in reversed(range(1, len(STEPS))):
        coarse, fine = remainders[i - 1], remainders[i]
        if coarse > floors[i - 1] and math.isfinite(coarse):
            least = math.log(coarse / max(fine, floors[i])) / math.log(STEPS[i - 1] / STEPS[i])
            if fine > floors[i] or least >= SLOPE:  # a drop into rounding bounds the slope from below
                return least, STEPS[i]
    return None, math.inf


STEPS = tuple(10.0 ** (-1 - i / 2) for i in range(9))
SLOPE = 1.95
FAULT = 1e-5
_SEEN = 1e-4  # a third of the fault that must not pass
_ABOVE = 100.0  # a remainder of a hundred times the noise is known to a hundredth, its slope to 0.02
_SHARP = 1e-3
