"""Checking an estimator with one call."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import torch

from funcmlo._tree import Tree
from funcmlo.describe import compact
from funcmlo.errors import DefinitionError, EstimatorError, FuncmloWarning, listing, suggest
from funcmlo.hypergrad.base import BestResponse, Claims, Requires
from funcmlo.multilevel import Multilevel
from funcmlo.testing import settings
from funcmlo.testing.checks.base import Check, NotApplicableError
from funcmlo.testing.checks.every import CHECKS
from funcmlo.testing.checks.known import known_checks
from funcmlo.testing.classics import Mirrlees, MitsosBarton
from funcmlo.testing.equilibrium import Equilibrium
from funcmlo.testing.examined import Examined
from funcmlo.testing.known import Known
from funcmlo.testing.network import Network
from funcmlo.testing.outcome import Outcome, Report
from funcmlo.testing.quadratic import Quadratic
from funcmlo.testing.regression import LogisticRegression, Ridge
from funcmlo.testing.saddle import Saddle
from funcmlo.testing.singular import SingularHessian

PROBLEMS: tuple[Known, ...] = (
    Quadratic(condition=10.0),
    Ridge(),
    LogisticRegression(),
    Network(seed=8),
    SingularHessian(),
    Saddle(),
    Equilibrium(),
    MitsosBarton(),
    Mirrlees(),
)
"""Those of the known problems whose hypergradient shows the response, and that take no more than a moment."""


def check_estimator(
    estimator: BestResponse,
    *,
    problems: Sequence[Known] | None = None,
    checks: Sequence[str] | None = None,
    hypergradient: Callable[..., Tree] = Multilevel.hypergradient,
    seed: int = 0,
    raise_on_failure: bool = False,
) -> Report:
    """Check a hypergradient estimator against everything that is known, and say what is wrong where it is.

    It is held to what its `claims` promise, on problems that meet what they assume: small quadratic problems, where each
    fault shows by itself, and problems whose hypergradient is known. A knob is turned until the answer no longer
    changes before the answer is judged.

    Args:
        estimator: the estimator, an instance.
        problems: problems with known hypergradients, instead of the library's; for an estimator that is made for one level
            (its claims assume "its own level"), problems of that level.
        checks: the names of the checks to run; None for all.
        hypergradient: what composes hypergradients of programs, `hypergradient(program, state, batches, of=name)`, for those
            who write their own.
        seed: decides the numbers of the problems.
        raise_on_failure: whether a failed check is an error, for use in a test.

    Returns:
        The report: `report.passed`, `report.failures` by name; it prints itself.

    Raises:
        DefinitionError: what came is no estimator, or there is no such check.
        EstimatorError: a check failed, and `raise_on_failure` was set; or no check with a number applies.

    Example:
        >>> import funcmlo as fm
        >>> fm.testing.check_estimator(fm.AID(fm.CG(20))).passed
        True
    """
    _checked(estimator)
    chosen = _chosen(checks, [*CHECKS, *_known(problems)])
    examined = Examined(estimator, seed, hypergradient)
    report = Report(compact(estimator), tuple(_outcome(one, examined) for one in chosen))
    if all(outcome.status == "skipped" for outcome in report):
        why = next(iter(report)).message
        raise EstimatorError(f"no check applies to {compact(estimator)}, so nothing was shown: {why}.")
    if raise_on_failure:
        report.raise_on_failure()
    return report


def parametrize_with_checks(
    estimators: Sequence[BestResponse], *, problems: Sequence[Known] | None = None, seed: int = 0
) -> Callable[[Any], Any]:
    """Make a pytest test of every estimator and every check.

    The test receives `estimator` and `check`, and calls `check(estimator)`, which raises EstimatorError where it fails and
    skips where the estimator promises nothing of the kind.

    Args:
        estimators: the estimators.
        problems: as for `check_estimator`.
        seed: decides the numbers of the problems.

    Returns:
        The decorator.

    Raises:
        DefinitionError: something that came is no estimator.

    Example:
        >>> import funcmlo as fm
        >>> @fm.testing.parametrize_with_checks([fm.AID(fm.CG(20)), fm.ITD()])
        ... def test_estimators(estimator, check):
        ...     check(estimator)
    """
    import pytest  # a dependency of the tests that use it, and of nothing else

    def run(one: Check, examined: Examined, estimator: BestResponse) -> None:
        outcome = _outcome(one, examined if estimator is examined.estimator else replace(examined, estimator=estimator))
        if outcome.status == "skipped":
            pytest.skip(outcome.message)
        Report(compact(estimator), (outcome,)).raise_on_failure()

    cases, seen = [], Counter[str]()
    for estimator in estimators:
        _checked(estimator)
        seen[compact(estimator)] += 1
        again = f" {seen[compact(estimator)]}" if seen[compact(estimator)] > 1 else ""
        examined = Examined(estimator, seed)
        for one in [*CHECKS, *_known(problems)]:
            name = f"{compact(estimator)}{again}-{one.name}"
            cases.append(pytest.param(estimator, partial(run, one, examined), id=name))
    return pytest.mark.parametrize(("estimator", "check"), cases)


def _checked(estimator: Any) -> None:
    if isinstance(estimator, type) and issubclass(estimator, BestResponse):
        raise DefinitionError(f"the class {estimator.__name__} came; expected an instance of it: {estimator.__name__}(…).")
    if not isinstance(estimator, BestResponse):
        raise DefinitionError(
            f"{type(estimator).__name__} came; expected an estimator, an instance of a subclass of fm.BestResponse."
        )
    if not isinstance(estimator.claims, Claims) or estimator.requires not in get_args(Requires):
        raise DefinitionError(
            f"{type(estimator).__name__} has claims={estimator.claims!r} and requires={estimator.requires!r}; expected "
            f"fm.Claims(…), and one of {listing(map(repr, get_args(Requires)))}."
        )
    if estimator.claims.knob is not None and settings.knob(estimator) is None:
        raise DefinitionError(
            f"{compact(estimator)} claims the knob {estimator.claims.knob!r}, and has no such field; name one of its own, "
            "or of its solver."
        )


def _known(problems: Sequence[Known] | None) -> tuple[Check, ...]:
    if isinstance(problems, Known):
        raise DefinitionError(f"problems={problems!r}; expected a list: problems=[{problems!r}].")
    for problem in problems or ():
        if not isinstance(problem, Known):
            raise DefinitionError(
                f"problems={listing(type(p).__name__ for p in problems or ())}; expected instances of fm.testing.Known."
            )
    return known_checks(PROBLEMS) if problems is None else known_checks(problems, own=True)


def _chosen(names: Sequence[str] | None, checks: Sequence[Check]) -> Sequence[Check]:
    if names is None:
        return checks
    by_name = {one.name: one for one in checks}
    if not names:
        raise DefinitionError(f"checks= is empty; leave it out for all, or name some of {listing(by_name)}.")
    for name in names:
        if name not in by_name:
            raise DefinitionError(f"{name!r} is no check{suggest(name, by_name)} Checks: {listing(by_name)}.")
    return [by_name[name] for name in names]


def _outcome(one: Check, examined: Examined) -> Outcome:
    """Run a check; an exception of the estimator is a failure, told with its message."""
    dtype = torch.get_default_dtype()
    with warnings.catch_warnings(), torch.inference_mode(False), torch.enable_grad():
        warnings.simplefilter("ignore", FuncmloWarning)  # checks go where solvers do not converge, on purpose
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, under its transforms
        try:
            if (why := one.skip(examined)) is not None:
                return Outcome(one.name, "skipped", message=why)
            found = one.run(examined)
        except NotApplicableError as why_not:
            return Outcome(one.name, "skipped", message=str(why_not))
        except Exception as error:  # whatever a user's code raises is a finding about it
            return Outcome(one.name, "failed", message=f"{type(error).__name__}: {error}")
        finally:
            torch.set_default_dtype(dtype)
    return Outcome(one.name, "passed" if found else "failed", found.error, found.allowed, found.message)
