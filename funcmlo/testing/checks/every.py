"""All checks that need no problem of the user's, in the order of a report."""

from __future__ import annotations

from funcmlo.testing.checks import contract, draws, products, programs, steps, unrolls
from funcmlo.testing.checks.base import Check

CHECKS: tuple[Check, ...] = (
    *products.CHECKS,
    *steps.CHECKS,
    *unrolls.CHECKS,
    *draws.CHECKS,
    *programs.CHECKS,
    *contract.CHECKS,
)
