"""Hypothesis strategies: random trees, problems, graphs, hierarchies, batches and optimizers.

A failing example shrinks to the simplest value (fewest leaves and levels, condition 1, plain gradient descent) and is
printed as the code that makes it again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchopt.base import GradientTransformation

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.assumptions import Assumption
from funcmlo.batches import Feed
from funcmlo.errors import ParameterError, listing
from funcmlo.graph import Graph
from funcmlo.testing.classics import Mirrlees, MitsosBarton
from funcmlo.testing.equilibrium import Equilibrium
from funcmlo.testing.hierarchy import Hierarchy
from funcmlo.testing.known import Known
from funcmlo.testing.literature import SMD
from funcmlo.testing.network import Network
from funcmlo.testing.optimizers import OPTIMIZERS
from funcmlo.testing.quadratic import Quadratic
from funcmlo.testing.regression import LogisticRegression, Ridge
from funcmlo.testing.saddle import Saddle
from funcmlo.testing.singular import SingularHessian
from funcmlo.testing.written import Written, code, transformation

try:
    from hypothesis import strategies as st
    from hypothesis.strategies import SearchStrategy
    from hypothesis.vendor.pretty import for_type_by_name
except ImportError as error:
    raise ImportError("funcmlo.testing.strategies needs hypothesis: pip install hypothesis") from error


def _print_tensor(x: Any, printer: Any, cycle: bool) -> None:
    del cycle
    printer.text(code(x) if x.numel() <= 1000 else repr(x))


# A tensor's own repr has four digits, from which no failure can be made again.
for_type_by_name("torch", "Tensor", _print_tensor)

SEEDS = st.integers(0, 2**20)


def trees(
    dtypes: Sequence[torch.dtype] = (torch.float64,), max_leaves: int = 4, numbers: SearchStrategy[float] | None = None
) -> SearchStrategy[Tree]:
    """Draw trees of tensors: dicts, lists and tuples, leaves without axes or without entries, `None`.

    Args:
        dtypes: what the leaves may be, the simplest first.
        max_leaves: how many there are, at most.
        numbers: the entries; zeros without it.

    Returns:
        The strategy.

    Example:
        >>> from hypothesis import find
        >>> find(trees(), lambda tree: True)
        tensor(0., dtype=torch.float64)
    """

    @st.composite
    def leaf(draw: st.DrawFn) -> Tensor:
        dtype = draw(st.sampled_from(list(dtypes)))
        shape = draw(st.lists(st.integers(0, 3), max_size=2))
        if numbers is None:
            return torch.zeros(shape, dtype=dtype)
        return torch.tensor([draw(numbers) for _ in range(math.prod(shape))], dtype=dtype).reshape(shape)

    return st.recursive(
        leaf(),
        lambda parts: (
            st.lists(parts, max_size=3)
            | st.tuples(parts, parts | st.none())
            | st.dictionaries(st.sampled_from("abc"), parts, max_size=3)
        ),
        max_leaves=max_leaves,
    )


def vectors(like: Tree) -> SearchStrategy[Tree]:
    """Draw trees like another, of small numbers; the zero vector is the simplest.

    Args:
        like: a tree of floating-point tensors.

    Returns:
        The strategy.
    """
    # Quarters are exact in every dtype, and read well.
    number = st.integers(-12, 12).map(lambda k: k / 4)

    @st.composite
    def vector(draw: st.DrawFn) -> Tree:
        def leaf(x: Tensor) -> Tensor:
            return torch.tensor([draw(number) for _ in range(x.numel())], dtype=x.dtype).reshape(x.shape)

        return _tree.map(leaf, like)

    return vector()


_FAMILIES: dict[type[Known], Callable[[], SearchStrategy[Known]]] = {
    Quadratic: lambda: st.builds(
        Quadratic, seed=SEEDS, condition=st.sampled_from([1.0, 3.0, 10.0]), y_like=trees(), x_like=trees()
    ),
    Ridge: lambda: st.builds(Ridge, seed=SEEDS, features=st.integers(1, 4), shared=st.booleans()),
    LogisticRegression: lambda: st.builds(
        LogisticRegression, seed=SEEDS, learned=st.sampled_from(["weights", "regularizers"]), features=st.integers(1, 4)
    ),
    Network: lambda: st.builds(Network, seed=st.sampled_from([0, 1, 2, 3, 8, 9]), hidden=st.integers(2, 3)),
    SingularHessian: lambda: st.integers(1, 3).flatmap(
        lambda rank: st.builds(
            SingularHessian,
            seed=SEEDS,
            size=st.integers(rank + 1, 5),
            rank=st.just(rank),
            condition=st.sampled_from([1.0, 3.0, 10.0]),
        )
    ),
    Saddle: lambda: st.builds(Saddle, seed=SEEDS, size=st.integers(1, 3), coupling=st.sampled_from([0.0, 0.5])),
    Equilibrium: lambda: st.builds(
        Equilibrium, seed=SEEDS, size=st.integers(1, 5), contraction=st.sampled_from([0.25, 0.5])
    ),
    SMD: lambda: st.builds(SMD, st.sampled_from([1, 2, 3, 4, 5, 7, 8]), seed=SEEDS),
    MitsosBarton: lambda: st.builds(MitsosBarton, st.sampled_from([0.5, 0.25, 0.75])),
    Mirrlees: lambda: st.builds(Mirrlees, st.sampled_from([0.99, 0.98, 0.97])),
}


def problems(
    assumptions: Collection[Assumption] = (), families: Collection[type[Known]] = tuple(_FAMILIES)
) -> SearchStrategy[Known]:
    """Draw problems with known hypergradients; a quadratic of condition 1 is the simplest.

    Args:
        assumptions: what the problems meet, such as an estimator's `claims.assumes`.
        families: the classes to draw from.

    Returns:
        The strategy.

    Raises:
        ParameterError: none of the families meets the assumptions.

    Example:
        >>> from hypothesis import find
        >>> find(problems({"minimization"}, families=[Saddle, Equilibrium]), lambda problem: True)
        Saddle(size=1, coupling=0.0)
    """
    chosen = [family for family in _FAMILIES if family in families and set(assumptions) <= family.assumptions]
    if not chosen:
        raise ParameterError(
            f"problems: none of {listing(family.__name__ for family in families)} meets {listing(sorted(assumptions))}."
        )
    drawn = st.one_of([_FAMILIES[family]() for family in chosen])
    if Quadratic not in chosen:
        return drawn
    number = torch.zeros((), dtype=torch.float64)
    return st.just(Quadratic(condition=1.0, y_like=number, x_like=number)) | drawn


@st.composite
def hierarchies(draw: st.DrawFn, most: int = 5, least: int = 2) -> Hierarchy:
    """Draw quadratic problems on random graphs of levels.

    Args:
        draw: hypothesis's own.
        most: how many levels there are, at most.
        least: and at least.

    Returns:
        The problem; one whose levels read nothing is the simplest.

    Example:
        >>> from hypothesis import find
        >>> find(hierarchies(), lambda h: h.reads["p0"] != ())
        Hierarchy({'p0': ('p1',), 'p1': ()}, size=1)
    """
    levels, density = range(draw(st.integers(least, most))), draw(st.sampled_from([0.3, 0.5, 0.8]))
    edges = {(i, j) for i in levels for j in levels if i != j and draw(st.floats(0, 1)) > 1 - density}
    # Most levels without edges go, so that an example shrinks by losing edges, with no need to move them.
    linked = {i for edge in edges for i in edge}
    alone = sorted(set(levels) - linked)
    kept = sorted(linked | set(alone[: max(draw(st.integers(0, len(alone))), least - len(linked))]))
    names = {i: f"p{place}" for place, i in enumerate(kept)}
    reads = {names[i]: tuple(names[j] for j in kept if (i, j) in edges) for i in kept}
    return Hierarchy(reads, seed=draw(SEEDS), size=draw(st.integers(1, 2)))


def graphs(most: int = 5, least: int = 2) -> SearchStrategy[Graph]:
    """Draw dataflow graphs of levels `p0`, `p1`, …; one without edges is the simplest.

    Args:
        most: how many levels there are, at most.
        least: and at least.

    Returns:
        The strategy.

    Example:
        >>> from hypothesis import find
        >>> find(graphs(), lambda graph: graph.paths("p1") != ())
        Graph(levels=('p0', 'p1'), u2l=(('p1', 'p0'),), l2u=(('p0', 'p1'),))
    """

    def graph(h: Hierarchy) -> Graph:
        rank = h.names.index
        pairs = [(name, source) for name, sources in h.reads.items() for source in sources]
        u2l = tuple((source, name) for name, source in pairs if rank(source) > rank(name))
        l2u = tuple((source, name) for name, source in pairs if rank(source) < rank(name))
        return Graph(h.names, u2l, l2u)

    @st.composite
    def drawn(draw: st.DrawFn) -> Graph:  # not `map`, which would be printed as a call
        return graph(draw(hierarchies(most, least)))

    return drawn()


@dataclass(frozen=True, repr=False, eq=False)
class Cycle(Written):
    """A function from a step's number to a batch that goes round and round.

    Args:
        batches: the batches of steps 0, 1, ….

    Example:
        >>> Cycle((10, 20))(3)
        20
    """

    batches: tuple[Tree, ...]

    def __call__(self, t: int) -> Tree:
        """Return the batch of step t."""
        return self.batches[t % len(self.batches)]


def batches(like: Tree, most: int = 3) -> SearchStrategy[Tree | Feed]:
    """Draw what `batches[level]` may be: a fixed batch, or a function from the step's number to one.

    Args:
        like: a tree of the shapes of one batch.
        most: how many different batches a function has, at most.

    Returns:
        The strategy; a fixed batch of zeros is the simplest.
    """
    one = vectors(like)
    several = st.lists(one, min_size=1, max_size=most).map(tuple)

    @st.composite
    def source(draw: st.DrawFn) -> Feed:
        return Cycle(draw(several))

    return one | source()


def optimizers(kinds: Collection[str] = tuple(OPTIMIZERS)) -> SearchStrategy[GradientTransformation]:
    """Draw torchopt transformations of every kind that the library knows; gradient descent is the simplest.

    Args:
        kinds: which of the names in `funcmlo.testing.optimizers.OPTIMIZERS`.

    Returns:
        The strategy; its values' repr is the code that makes them.

    Raises:
        ParameterError: a kind is not known.

    Example:
        >>> from hypothesis import find
        >>> find(optimizers(["sgd", "adam"]), lambda optimizer: "adam" in repr(optimizer))
        torchopt.adam(0.1)
    """
    if unknown := set(kinds) - set(OPTIMIZERS):
        raise ParameterError(f"optimizers: {listing(sorted(unknown))} came; expected some of {listing(OPTIMIZERS)}.")
    rates = st.sampled_from([0.1, 0.05, 0.01])

    @st.composite
    def optimizer(draw: st.DrawFn) -> GradientTransformation:
        kind = draw(st.sampled_from([kind for kind in OPTIMIZERS if kind in kinds]))
        return transformation(OPTIMIZERS[kind].format(draw(rates)))

    return optimizer()
