"""Kronecker-factored curvature (K-FAC, EK-FAC), through curvlinops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn

from funcmlo import _tracing, _tree
from funcmlo._tree import Tree
from funcmlo.assumptions import Assumption
from funcmlo.errors import DefinitionError, EstimatorError, listing
from funcmlo.linear.base import LinearSolver, Solution
from funcmlo.linear.checks import check_iterations, check_not_negative
from funcmlo.linear.kronecker import Block, Fisher, Settings, Sharing, blocks, covered, load
from funcmlo.linear.preconditioner import Preconditioner
from funcmlo.operators import Operator
from funcmlo.signature import Call, read_call
from funcmlo.stateless import Stateless

_LOSSES = (nn.MSELoss, nn.CrossEntropyLoss, nn.BCEWithLogitsLoss)


@dataclass(frozen=True)
class KFAC(LinearSolver, Preconditioner):
    """w = (K + λI)⁻¹v, K a Kronecker-factored approximation of a network's Gauss–Newton matrix, layer by layer.

    A layer with the weight W (its bias a further column) has the block W ↦ B W A: A = E[aaᵀ] of its inputs a, B = E[ggᵀ] of
    the gradients g by its outputs. Layers do not see each other. It is the Gauss–Newton matrix itself for one linear layer
    under a squared error; for a deep network it is crude, and no product with H is made: the answer has no residual.
    `CG(…, preconditioner=KFAC(…))` solves the system itself. That saves products where a layer's inputs or gradients differ
    in scale; where H is ill-conditioned for another reason (more parameters than the examples determine, and a small λ) it
    may take more of them than no preconditioner.

    One solve costs a forward pass, as many backward passes as the network has outputs (``"mc"``: as many as samples), and
    two eigendecompositions a layer, at the level's solution and its last batch. The level's parameters are the network's:
    `net.params()`. What the cost has besides this loss (example weights, a regularizer) is not seen.

    It needs `pip install 'funcmlo[kfac]'`, and cannot be mapped by `torch.func.vmap`.

    Args:
        net: the network, with Linear and Conv2d layers, each called once by its forward; it is never changed.
        loss: an `nn.MSELoss`, `nn.CrossEntropyLoss` or `nn.BCEWithLogitsLoss` of the network's outputs, without weights.
        data: `data(params, …)` → (X, y), the network's inputs and targets. Its first argument is the level's own
            parameters, the others are level names and `batch`, as a loss's. y matters to ``"empirical"`` only.
        damping: λ > 0, a regularizer's curvature included.
        others: the curvature c ≥ 0 that stands for parameters of other layers (normalization, embeddings), whose block is
            (c + λ)I; None refuses them.
        fisher: how B is taken: ``"type-2"`` by the loss's Hessian, exactly; ``"mc"`` by labels drawn from the network's own
            predictions; ``"empirical"`` by the targets; ``"forward-only"`` B = I.
        samples: the number of labels drawn by ``"mc"``, for each example.
        sharing: how a layer applied at many places of an example (a convolution) is summed up: ``"expand"``, each place for
            itself, or ``"reduce"``, the places together.
        eigenvalue_corrected: EK-FAC: K keeps the eigenvectors of B and A, but its eigenvalues are measured along them.

    Raises:
        DefinitionError: a setting is out of its range.
        EstimatorError: curvlinops is not installed.

    Example:
        >>> import torch, torchopt, funcmlo as fm
        >>> net, loss = fm.Stateless(torch.nn.Linear(1, 1, bias=False)), torch.nn.MSELoss()
        >>> inputs, targets = torch.tensor([[1.0], [2.0]]), torch.tensor([[2.0], [4.0]])
        >>> program = fm.Multilevel(
        ...     fm.Level(
        ...         "w",
        ...         lambda w, x: loss(net(w, inputs), x * targets),
        ...         torchopt.sgd(0.2),
        ...         response=fm.AID(KFAC(net, loss, data=lambda w, x: (inputs, x * targets), damping=1e-6)),
        ...     ),
        ...     fm.Level("x", lambda x, w: w["weight"].sum(), torchopt.sgd(0.1)),
        ... )
        >>> state = program.init({"w": {"weight": torch.tensor([[2.0]])}, "x": torch.tensor(1.0)})
        >>> program.hypergradient(state, {}, of="x")
        tensor(2.0000)

    References:
        Martens and Grosse 2015, arXiv 1503.05671; George et al. 2018 (EK-FAC), arXiv 1806.03884; Eschenhagen et al. 2023,
        arXiv 2311.00636, for weight sharing; for implicit derivatives Grosse et al. 2023, arXiv 2308.03296.
    """

    net: Stateless | nn.Module
    loss: nn.Module
    data: Callable[..., tuple[Tensor, Tensor]]
    damping: float
    others: float | None = None
    fisher: Fisher = "type-2"
    samples: int = 1
    sharing: Sharing = "expand"
    eigenvalue_corrected: bool = False

    _net: Stateless = field(init=False, repr=False)
    _data: Call = field(init=False, repr=False)

    symmetric_only: ClassVar[bool] = True
    assumes: ClassVar[frozenset[Assumption]] = frozenset({"its own level"})
    uses_operator: ClassVar[bool] = False
    differentiable: ClassVar[bool] = False
    vmap: ClassVar[bool] = False
    data_parallel: ClassVar[bool] = False
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse settings out of range, read what the data needs, and see that curvlinops is there."""
        super().__post_init__()
        if not isinstance(self.net, (Stateless, nn.Module)):
            raise DefinitionError(f"KFAC(net={self.net!r}): expected fm.Stateless(module), or the module.")
        object.__setattr__(self, "_net", self.net if isinstance(self.net, Stateless) else Stateless(self.net))
        _check_loss(self.loss)
        if not callable(self.data):
            raise DefinitionError(f"KFAC(data={self.data!r}): expected a function from the parameters to (X, y).")
        object.__setattr__(self, "_data", read_call(self.data, None, owner="KFAC: its data", own=True)[0])
        check_not_negative("KFAC", damping=self.damping, **({} if self.others is None else {"others": self.others}))
        if not self.damping:
            raise DefinitionError("KFAC(damping=0): K may be singular; expected a positive number, such as 1e-3.")
        for name, known in (("fisher", get_args(Fisher)), ("sharing", get_args(Sharing))):
            if getattr(self, name) not in known:
                raise DefinitionError(f"KFAC({name}={getattr(self, name)!r}): expected one of {listing(map(repr, known))}.")
        check_iterations("KFAC", self.samples, "samples")
        if self.samples > 1 and self.fisher != "mc":
            raise DefinitionError(f"KFAC(samples={self.samples}): only fisher='mc' draws; leave samples= out.")
        if self.eigenvalue_corrected and self.fisher == "forward-only":
            raise DefinitionError("KFAC(eigenvalue_corrected=True): 'forward-only' has no eigenvalues to measure.")
        load()

    def prepare(self, operator: Operator) -> Callable[[Tree], Tree]:
        """Return v ↦ (K + λI)⁻¹v.

        Args:
            operator: H, of which only the point is looked at.

        Returns:
            The map.
        """
        return self.inverse(operator)

    def compute(self, operator: Operator, prepared: Callable[[Tree], Tree], rhs: Tree, start: None) -> Solution:
        """Return w = (K + λI)⁻¹v, without looking at its residual.

        Args:
            operator: H, not applied.
            prepared: the map.
            rhs: v.
            start: not used.

        Returns:
            w, without statistics.
        """
        del operator, start
        return Solution(prepared(rhs), iterations=1, residual=None, converged=None, negative_curvature=None)

    def inverse(self, operator: Operator) -> Callable[[Tree], Tree]:
        """Return r ↦ (K + λI)⁻¹r, symmetric and positive definite.

        Args:
            operator: H, of which only the point is looked at.

        Returns:
            The map.

        Raises:
            EstimatorError: the operator has no point, or K-FAC cannot be taken there.
            ParameterError: the level's parameters are not the network's.
        """
        point = operator.point
        if point is None or point.evaluate is None:
            raise EstimatorError("KFAC looks at a level's solution, and this operator belongs to none; use it in AID(…).")
        # Hooks and torch.autograd.grad know nothing of torch.func's levels, so everything is done outside of them.
        found = _tracing.call_outside(lambda params, inputs: self._blocks(point, params, inputs), point.params, point.inputs)

        def inverse(r: dict[str, Tensor]) -> dict[str, Tensor]:
            answer = r.copy()
            if self.others is not None:
                answer.update(_tree.scale(1 / (self.others + self.damping), r))
            for block in found:
                answer.update(block.solve(r, self.damping))
            return answer

        return inverse

    def _blocks(self, point: Any, params: dict[str, Tensor], inputs: dict[str, Tree]) -> list[Block]:
        """K's blocks at some parameters."""
        if _tracing.unreadable():
            raise EstimatorError(
                "KFAC puts hooks on a module, which torch.func.vmap and forward mode do not bear; use CG(…)."
            )
        pair = point.evaluate(self._data, params, inputs)
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(x, Tensor) for x in pair)):
            raise EstimatorError(f"KFAC: its data returned {type(pair).__name__}; expected a pair (X, y) of tensors.")
        # Eigenvectors are not to be had in half precision.
        module, x = self._net.module(_tree.map(_at_least_single, params)), _at_least_single(pair[0])
        if self.others is None and (rest := [name for name in params if name not in covered(module)]):
            raise EstimatorError(
                f"KFAC knows Linear and Conv2d layers, and these parameters belong to none: {listing(rest)}. Give others= a "
                "number that stands for their curvature, such as 1.0."
            )
        settings = Settings(self.fisher, self.samples, self.sharing, self.eigenvalue_corrected, point.seed)
        return blocks(module, self.loss, x, pair[1], settings)


def _at_least_single(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _check_loss(loss: nn.Module) -> None:
    """Raise unless curvlinops knows the loss, with all that it has."""
    if type(loss) not in _LOSSES:
        raise DefinitionError(
            f"KFAC(loss={loss!r}): expected an instance of {listing(f'nn.{kind.__name__}' for kind in _LOSSES)}."
        )
    if loss.reduction not in {"mean", "sum"}:
        raise DefinitionError(f"KFAC(loss={loss!r}): reduction={loss.reduction!r}; expected 'mean' or 'sum'.")
    for name in ("weight", "pos_weight", "label_smoothing"):
        given = getattr(loss, name, None)
        if isinstance(given, Tensor) or given:
            raise DefinitionError(
                f"KFAC(loss={loss!r}): {name}= is not seen by K-FAC; leave it out (label smoothing has no curvature)."
            )
