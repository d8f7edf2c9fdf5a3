"""What a best response is: the interface of every hypergradient estimator.

Notation: lower cost g(y, x), its solution y*(x), J = ∂y*/∂x. An estimator answers Jᵀv for every input x at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from funcmlo import _tracing
from funcmlo._tree import Tree
from funcmlo.assumptions import Assumption
from funcmlo.describe import compact
from funcmlo.errors import DefinitionError, EstimatorError, listing, suggest
from funcmlo.hypergrad.solved import Keep, Solved
from funcmlo.hypergrad.stats import Stats

Requires = Literal["solution", "trajectory", "replay"]
Target = Literal["implicit", "unrolled", "identity", "step"]


@dataclass(frozen=True)
class Claims:
    """What an estimator promises, and so what it is checked for.

    Attributes:
        target: what it converges to: the implicit formula −∇²_xy g H⁻¹v, the derivative of the unrolled inner steps,
            the identity-inverse formula −∇²_xy g v, or the derivative of one step of the optimizer.
        exact: whether it reaches its target to rounding on a converged problem (else to its knob's accuracy).
        stochastic: whether its answer depends on random draws; it is then unbiased for its target.
        knob: the field whose limit takes it to its target, such as ``"iterations"``; None without one.
        differentiable: whether its answer can be differentiated again, as `composition="nested"` and nested `argmin` do.
        vmap: whether it works on programs mapped by `torch.func.vmap`.
        data_parallel: whether processes that share a level's batches get the answer of one that has them all, as everything
            does that sees the examples by `Solved.loss` and `Solved.update` alone.
        assumes: what it asks of a problem; where a problem does not meet it, it is held to nothing.
    """

    target: Target = "implicit"
    exact: bool = True
    stochastic: bool = False
    knob: str | None = None
    differentiable: bool = False
    vmap: bool = True
    data_parallel: bool = True
    assumes: frozenset[Assumption] = frozenset({"minimization", "positive definite"})

    def __post_init__(self) -> None:
        """Refuse claims that mean nothing, which nothing could be held to."""
        if self.target not in get_args(Target):
            raise DefinitionError(
                f"Claims(target={self.target!r}){suggest(str(self.target), get_args(Target))} Expected "
                f"{listing(map(repr, get_args(Target)))}."
            )
        asked = {self.assumes} if isinstance(self.assumes, str) else set(self.assumes)
        if isinstance(self.assumes, str) or not asked <= set(get_args(Assumption)):
            raise DefinitionError(
                f"Claims(assumes={self.assumes!r}): expected a set of some of {listing(map(repr, get_args(Assumption)))}."
            )


@dataclass(frozen=True)
class BestResponse(ABC):
    """Base of the estimators: frozen configuration, explicit state.

    A subclass answers `vjp`; it says in `requires` what it needs besides the solution (`"trajectory"`: the recorded
    inner run; `"replay"`: that every inner step can be run again by `Solved.update`), and in `claims` what the checks
    may hold it to.

    Example:
        An estimator that takes the inverse Hessian to be the identity, in one product:

        >>> import torch, funcmlo as fm
        >>> class Identity(fm.BestResponse):
        ...     requires = "solution"
        ...     claims = fm.Claims(target="identity")
        ...     def vjp(self, solved, cotangent, state):
        ...         def inner_gradient(inputs):
        ...             return torch.func.grad(lambda y: -solved.loss(y, inputs))(solved.params)
        ...         _, pullback = torch.func.vjp(inner_gradient, solved.inputs)
        ...         (products,) = pullback(cotangent)
        ...         return products, state, fm.Stats(hvps=1)
        >>> fm.testing.check_estimator(Identity()).passed
        True
    """

    requires: ClassVar[Requires] = "solution"
    claims: ClassVar[Claims] = Claims()
    sees_step: ClassVar[bool] = False
    """Whether it looks at the optimizer's step, the projection included, and not at the cost alone."""

    second_order: ClassVar[bool] = True
    """Whether it takes more of the level's cost than gradients: second derivatives, or forward mode."""
    total: ClassVar[bool] = True
    """Whether it works where the level's cost has solutions of levels below inside, as in `composition="nested"`."""
    shares_samples: ClassVar[bool] = False
    """Whether it draws samples that processes can share."""
    steps_again: ClassVar[bool] = False
    """Whether it makes steps of its own with the level's optimizer and projection."""
    uses_optimizer: ClassVar[bool] = False
    """Whether it looks at the optimizer's state at the solution."""

    @property
    def follows_start(self) -> bool:
        """Whether it differentiates by where the inner loop begins."""
        return self.requires != "solution"

    @property
    def in_the_open(self) -> bool:
        """Whether the inner steps are differentiated where they are made, by whoever differentiates the program: `ITD()`."""
        return False

    @property
    def synchronizes_once(self) -> bool:
        """Whether processes that share batches average finished hypergradients alone, and no derivative on the way."""
        return False

    def init(self, params: Tree) -> Any:
        """Return the estimator's initial state for a level with these parameters; None when it keeps nothing."""
        del params
        return None

    def keep(self, steps: int) -> Keep:
        """Say which standings of an inner loop are to be kept as it runs, for `Solved.kept`.

        Args:
            steps: the number of inner steps.

        Returns:
            None of them.
        """
        del steps
        return Keep()

    @abstractmethod
    def vjp(self, solved: Solved, cotangent: Tree, state: Any) -> tuple[dict[str, Tree], Any, Stats | Mapping[str, Any]]:
        """Return (∂θ*/∂input)ᵀ · cotangent for every input of the level.

        Args:
            solved: the lower level at its solution.
            cotangent: a tree like `solved.params`.
            state: what `init` or the last call returned.

        Returns:
            The cotangents by input name (each a tree like that input), the new state, and the stats.
        """


def check_mapped(owner: str, response: BestResponse) -> None:
    """Raise under torch.func.vmap if an estimator says that it does not work there.

    Args:
        owner: whose response it is, for the message.
        response: the estimator.

    Raises:
        EstimatorError: its claims say `vmap=False`, and torch.func.vmap is active.
    """
    if not response.claims.vmap and _tracing.mapping():
        raise EstimatorError(
            f"{owner}: {compact(response)} does not work under torch.func.vmap (its claims say vmap=False); "
            "call it in a loop (of a level with tasks: chunk=1), or use AID(CG(…)) or ITD()."
        )
