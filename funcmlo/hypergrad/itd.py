"""Iterative differentiation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, ClassVar, Literal

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.errors import DefinitionError, EstimatorError
from funcmlo.hypergrad.base import BestResponse, Claims, Requires
from funcmlo.hypergrad.checkpoint import Checkpoint, Every
from funcmlo.hypergrad.forward import columnwise
from funcmlo.hypergrad.reverse import Rewind
from funcmlo.hypergrad.solved import Keep, Solved
from funcmlo.hypergrad.stats import Stats

NO_STEPS = (
    "ITD differentiates the inner steps, but none were made (steps=0 or solve=False); use AID, which needs the solution "
    "alone, or solve the lower level."
)

Memory = Literal["store", "recompute", "mixed"]


@dataclass(frozen=True)
class ITD(BestResponse):
    """Jᵀv through the inner steps y_{t+1} = Φ_t(y_t, s_t, x), the optimizer's state s_t included.

    It is the exact derivative of the program that ran, converged or not, and the only family here that follows
    what the optimizer does: learning rates, momentum, clipping, projections, and where the inner loop starts.

    Reverse mode costs about one Hessian-vector product per inner step T; its memory is a choice. With p for the level's
    parameters and its optimizer's state:

    - `memory="store"`: the activations of all inner steps, each step made once. The only one that can be differentiated
      again.
    - `"recompute"`: T·p and one step's graph; every step is made twice.
    - `"mixed"`: T·p and one step's activations with their tangents: forward mode over reverse mode in place of a graph of
      the gradient; every step is made twice.
    - `Checkpoint()`: 2√T·p and one step's graph, every step made up to three times; `Checkpoint(arity=k)`: about
      (k − 1)·log_k T·p, every step made up to 1 + ⌈log_k T⌉ times. `Checkpoint(…, mixed=True)` in mixed mode.

    All of them give the same numbers to rounding: steps are made again to the bit, from indexed batches and their own seeds.

    Forward mode costs N·T products for the N scalars of the inputs, in memory that does not grow with T: for few
    hyperparameters.

    Args:
        mode: `"reverse"` or `"forward"`.
        window: differentiate the last `window` inner steps only, as if the loop had begun there: a bias that decays with
            the window as (1 − learning rate · curvature)^window; None for all of them.
        memory: how reverse mode keeps the inner run.
        offload: whether what is kept is moved to the CPU's memory.
        chunk: how many of forward mode's N directions are taken at once; None for all.

    Raises:
        DefinitionError: a setting is out of its range, or two do not go together.

    Example:
        One step of gradient descent from 0 on (y − x)²/2 with rate 1/2 gives y = x/2:

        >>> import torch, torchopt, funcmlo as fm
        >>> program = fm.Multilevel(
        ...     fm.Level("y", lambda y, x: ((y - x) ** 2).sum() / 2, torchopt.sgd(0.5), response=ITD()),
        ...     fm.Level("x", lambda x, y: y.sum(), torchopt.sgd(0.1)),
        ... )
        >>> state = program.init({"y": torch.zeros(2), "x": torch.tensor([1.0, 2.0])})
        >>> program.hypergradient(state, {}, of="x")
        tensor([0.5000, 0.5000])

    References:
        Franceschi et al. 2017, arXiv 1703.01785; Finn et al. 2017, arXiv 1703.03400; truncated, Shaban et al. 2019, arXiv
        1810.10667; mixed mode, Kemaev et al. 2025 (MixFlow-MG), arXiv 2505.00793.
    """

    mode: Literal["reverse", "forward"] = "reverse"
    window: int | None = None
    memory: Memory | Checkpoint = "store"
    offload: bool = False
    chunk: int | None = None

    requires: ClassVar[Requires] = "trajectory"
    claims: ClassVar[Claims] = Claims(target="unrolled", differentiable=True, assumes=frozenset())
    sees_step: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse settings out of range, and work out what they need and claim together."""
        if self.mode not in ("reverse", "forward"):
            raise DefinitionError(f"ITD(mode={self.mode!r}): expected 'reverse' or 'forward'.")
        for name in ("window", "chunk"):
            number = getattr(self, name)
            if number is not None and (isinstance(number, bool) or not isinstance(number, Integral) or number < 1):
                raise DefinitionError(f"ITD({name}={number!r}): expected an integer of at least 1, or None.")
        if not isinstance(self.memory, Checkpoint) and self.memory not in ("store", "recompute", "mixed"):
            raise DefinitionError(f"ITD(memory={self.memory!r}): expected 'store', 'recompute', 'mixed' or Checkpoint(…).")
        if not isinstance(self.offload, bool):
            raise DefinitionError(f"ITD(offload={self.offload!r}): expected True or False.")
        if self.mode == "forward" and (self.memory != "store" or self.offload):
            raise DefinitionError("ITD(mode='forward') keeps nothing of the inner run; leave memory= and offload= out.")
        if self.mode == "reverse" and self.chunk is not None:
            raise DefinitionError("ITD(chunk=…) is about forward mode's directions; leave it out, or take mode='forward'.")
        if self.offload and self.memory == "store":
            raise DefinitionError(
                "ITD(offload=True) moves kept standings to the CPU, and memory='store' keeps a graph; use 'recompute', "
                "'mixed' or Checkpoint(…)."
            )
        if not self.in_the_open:
            object.__setattr__(self, "requires", "replay")
            windowed = self.window is not None
            mixed = self.memory == "mixed" or (isinstance(self.memory, Checkpoint) and self.memory.mixed)
            claims = replace(
                type(self).claims,
                differentiable=False,
                exact=not windowed,
                knob="window" if windowed else None,
                assumes=frozenset({"minimization"} if mixed else ()),  # it takes steps apart into gradient and update
            )
            object.__setattr__(self, "claims", claims)

    @property
    def follows_start(self) -> bool:
        """Whether it differentiates by where the inner loop begins: not with a window."""
        return self.window is None

    @property
    def in_the_open(self) -> bool:
        """Whether the inner steps are recorded as they run, so that the answer can be differentiated again."""
        return self.mode == "reverse" and self.window is None and self.memory == "store"

    def keep(self, steps: int) -> Keep:
        """Say which standings of an inner loop are to be kept as it runs.

        Args:
            steps: the number of inner steps.

        Returns:
            Those before the steps that a reverse pass begins at.
        """
        first = self._first(steps)
        if self.in_the_open or not steps or (self.mode == "forward" and not first):
            return Keep()
        cuts = [first] if self.memory == "store" else self._schedule.cuts(first, steps)
        return Keep(frozenset(cuts), self.offload)

    def vjp(self, solved: Solved, cotangent: Tree, state: Any) -> tuple[dict[str, Tree], Any, Stats]:
        """Return (∂y_T/∂x)ᵀ v for every input.

        Args:
            solved: the lower level at its solution, with its trajectory.
            cotangent: v, a tree like `solved.params`.
            state: passed through.

        Returns:
            The cotangents by input name, the state, and the stats.

        Raises:
            EstimatorError: no inner steps were recorded.
        """
        if not solved.steps or (self.in_the_open and solved.trajectory is None):
            raise EstimatorError(NO_STEPS)
        first = self._first(solved.steps)
        if self.in_the_open:
            assert solved.trajectory is not None
            return solved.trajectory.pullback(cotangent), state, Stats(steps=solved.steps)
        rewind = Rewind(solved, self._schedule, self.offload)
        if self.mode == "forward":
            begin = rewind.standing(first) if first else None
            products = columnwise(solved, cotangent, begin, first, self.chunk)
            made = _tree.size(solved.inputs) * (solved.steps - first)
            return products, state, Stats(steps=made, replayed=rewind.replayed)
        take = rewind.recorded if self.memory == "store" else rewind.pullback
        products = take(cotangent, first)
        return products, state, Stats(steps=solved.steps - first, replayed=rewind.replayed)

    @property
    def _schedule(self) -> Checkpoint | Every:
        return self.memory if isinstance(self.memory, Checkpoint) else Every(mixed=self.memory == "mixed")

    def _first(self, steps: int) -> int:
        """The first step that is differentiated."""
        return 0 if self.window is None else max(0, steps - self.window)
