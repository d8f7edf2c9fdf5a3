"""Judging: one method on one question, a number against its tolerance, and a verdict."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from paper_repro.peers_correctness.methods import Method, Peer
from paper_repro.peers_correctness.problem import Question
from paper_repro.peers_correctness.reference import answer

Verdict = Literal["right", "right to its approximation", "wrong", "error", "not offered", "not asked", "not installed"]

APPROXIMATION = 1e-2
"""The relative error that a finite difference may have."""


@dataclass(frozen=True)
class Outcome:
    """What one method gave on one question.

    Attributes:
        peer: the library's name.
        method: the method's name.
        target: what the method says that it computes, and so what it was compared with.
        question: the question's name.
        seed: of the question.
        verdict: the verdict.
        error: ‖answer − reference‖ / ‖reference‖; None where there is none.
        tolerance: what the error was held to; None where there was nothing to hold.
        message: the exception, or what came in place of a number.
    """

    peer: str
    method: str
    target: str
    question: str
    seed: int
    verdict: Verdict
    error: float | None = None
    tolerance: float | None = None
    message: str | None = None


def judge(peer: str, method: Method, question: Question, seed: int) -> Outcome:
    """Put one question to one method.

    Args:
        peer: the library's name.
        method: one of its methods.
        question: the question.
        seed: which draw of the question it is.

    Returns:
        The outcome. Where there is no answer, a NaN, an infinity or an exception is right, and anything finite is wrong.
    """

    def outcome(
        verdict: Verdict, error: float | None = None, tolerance: float | None = None, message: str | None = None
    ) -> Outcome:
        return Outcome(peer, method.name, method.target, question.name, seed, verdict, error, tolerance, message)

    meant = method.target in question.targets and (question.rate_converges or not method.uses_rate)
    if not (meant and method.suits(question)):
        return outcome("not asked")
    if question.optimizer not in method.optimizers:
        return outcome("not offered")
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            given = method.call(question).detach().double()
    except Exception as problem:
        message = f"{type(problem).__name__}: {problem}".splitlines()[0]
        return outcome("error" if question.defined else "right", message=message)
    finite = bool(torch.isfinite(given).all())
    if not question.defined:
        return outcome("wrong" if finite else "right", message="finite" if finite else "not finite")
    tolerance = max(APPROXIMATION, question.tolerance) if method.difference else question.tolerance
    error = relative(given, answer(question, method.target)) if finite else math.inf
    if error > tolerance:
        return outcome("wrong", error, tolerance, None if finite else "not finite")
    plain = method.target in {"implicit", "unrolled"}
    return outcome("right" if plain else "right to its approximation", error, tolerance)


def relative(given: Tensor, reference: Tensor) -> float:
    """Return ‖given − reference‖ / ‖reference‖; infinite for another shape."""
    if given.shape != reference.shape:
        return math.inf
    return float((given - reference).norm() / reference.norm())


def judge_peer(peer: Peer, questions: Sequence[Question], seed: int) -> list[Outcome]:
    """Put all questions to all methods of a library.

    Args:
        peer: the library.
        questions: the questions.
        seed: which draw of the questions they are.

    Returns:
        The outcomes by method; a single one if the library is not installed or does not import.
    """
    if peer.version() is None:
        return [Outcome(peer.name, "–", "–", "–", seed, "not installed", message=f"pip has no {peer.distribution} here")]
    try:
        methods = peer.methods()
    except Exception as problem:
        message = f"does not import with torch {torch.__version__}: {type(problem).__name__}: {problem}"
        return [Outcome(peer.name, "–", "–", "–", seed, "error", message=message.splitlines()[0])]
    return [
        outcome
        for method in methods
        for outcome in together([judge(peer.name, method, question, seed) for question in questions])
    ]


def together(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Take back what a method was given for raising on the questions without an answer, if it raises on all others too."""
    answered = any(o.error is not None for o in outcomes)
    return [replace(o, verdict="error") if o.verdict == "right" and not answered else o for o in outcomes]
