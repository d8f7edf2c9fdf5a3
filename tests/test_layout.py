"""Imports run one way, files stay short, and the public names are what is documented."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import funcmlo as fm

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "funcmlo"

# Each module may import from those before it. A folder's interface (`__init__`) comes after its files.
ORDER = [
    "errors",
    "_hiding",
    "describe",
    "sharded",
    "kernels",
    "assumptions",
    "_leaves",
    "_tree",
    "clock",
    "_collectives",
    "sharing",
    "_processes",
    "precision",
    "_reached",
    "_random",
    "_tracing",
    "recording.tape",
    "recording.effects",
    "recording.replay",
    "recording.code",
    "recording.matrix_products",
    "recording.inductor",
    "recording",
    "compiler",
    "transforms",
    "projections.entries",
    "projections.boxes",
    "projections.simplices",
    "projections.balls",
    "projections.proximal",
    "projections",
    "_norms",
    "_mapped",
    "_diff",
    "_forward",
    "operators",
    "signature",
    "_attributes",
    "_modules",
    "_selection",
    "stateless",
    "optim.transformation",
    "optim.hyperparameters",
    "optim.closures",
    "optim.schedules",
    "optim.rates",
    "optim.decay",
    "optim.clipping",
    "optim.trace",
    "optim.roots",
    "optim.scale_by_adam",
    "optim.scale_by_adamax",
    "optim.scale_by_radam",
    "optim.scale_by_rms",
    "optim.scale_by_rss",
    "optim.scale_by_adadelta",
    "optim.gradient_descent",
    "optim.adaptive_moments",
    "optim.mending",
    "optim",
    "linear.arithmetic",
    "linear.base",
    "linear.checks",
    "linear.preconditioner",
    "linear.beginning",
    "linear.krylov",
    "linear.cg",
    "linear.direct",
    "linear.gmres",
    "linear.gradient_steps",
    "linear.identity",
    "linear.minres",
    "linear.neumann",
    "linear.normal_equations",
    "linear.nystrom",
    "linear.optimizer_identity",
    "linear.kronecker",
    "linear.kfac",
    "linear.differentiable",
    "linear",
    "hypergrad.solved",
    "hypergrad.stats",
    "hypergrad.base",
    "hypergrad.once",
    "curvature.base",
    "curvature.cross",
    "curvature.weightless",
    "curvature.hessian",
    "curvature.damped",
    "curvature.fixed_point",
    "curvature.gauss_newton",
    "curvature.resampled",
    "curvature",
    "hypergrad.adaptation",
    "hypergrad.warm",
    "hypergrad.aid",
    "hypergrad.finite_difference",
    "hypergrad.sama",
    "hypergrad.one_step",
    "hypergrad.checkpoint",
    "hypergrad.forward",
    "hypergrad.reverse",
    "hypergrad.itd",
    "hypergrad.sampling",
    "hypergrad.forward_gradient",
    "hypergrad.perturbed_solve",
    "hypergrad.penalty",
    "hypergrad",
    "solver",
    "chunks",
    "tasks",
    "state",
    "fields",
    "level",
    "layout",
    "drawing",
    "exactness",
    "graph",
    "dependence",
    "declared",
    "roles",
    "doubts",
    "schedule",
    "batches",
    "returned",
    "evaluation",
    "gradients",
    "problem",
    "replaying.layout",
    "replaying.recording",
    "replaying.steps",
    "replaying.trajectory",
    "replaying.second",
    "replaying",
    "descent",
    "unroll",
    "together",
    "purity",
    "closures",
    "solution",
    "operands",
    "_argmin",
    "_fixed_point",
    "fold",
    "initial",
    "finite",
    "binding",
    "loops",
    "nested",
    "metrics",
    "plan",
    "table",
    "train.history_figure",
    "train.history",
    "train.callbacks",
    "train.durable",
    "train.strides",
    "train.encoding",
    "train.manifest",
    "train.state_classes",
    "train.fitting",
    "train.places",
    "train.reading",
    "train.checkpoint",
    "train.csv_log",
    "train.numpy_default",
    "train.generators",
    "train.order",
    "train.loaders",
    "train.cycle",
    "train.early_stopping",
    "train.failures",
    "train.sources",
    "train.flow",
    "train.journal",
    "train.rows",
    "train.settings",
    "train.told",
    "train.validation",
    "train.loop",
    "train.mlflow_log",
    "train.progress",
    "train.tensorboard_log",
    "train.wandb_log",
    "train",
    "calls",
    "whole",
    "compiling",
    "comparing.peak_memory",
    "comparing.substitution",
    "footprint.law",
    "footprint.report",
    "footprint.predict",
    "footprint",
    "multilevel",
    "replicas",
    "comparing.reference",
    "comparing.measuring",
    "comparing.error_plot",
    "comparing.comparison",
    "comparing",
    "_compare",
    "probing.agreement",
    "probing.watching",
    "probing.remedies",
    "probing.outcome",
    "probing.case",
    "probing.interview",
    "probing.mapped",
    "probing.questions",
    "probing",
    "_probe",
    "testing.subjects",
    "testing.differences",
    "testing.taylor",
    "testing.dense",
    "testing.brute_force",
    "testing.complexified",
    "testing.written",
    "testing.known",
    "testing.quadratic",
    "testing.regression",
    "testing.singular",
    "testing.saddle",
    "testing.network",
    "testing.equilibrium",
    "testing.literature",
    "testing.classics",
    "testing.family",
    "testing.hierarchy",
    "testing.optimizers",
    "testing.strategies",
    "testing.by_hand",
    "testing.settings",
    "testing.matrices",
    "testing.outcome",
    "testing.examined",
    "testing.checks.base",
    "testing.checks.products",
    "testing.checks.steps",
    "testing.checks.unrolls",
    "testing.checks.draws",
    "testing.checks.programs",
    "testing.checks.contract",
    "testing.checks.known",
    "testing.checks",
    "testing.checks.every",
    "testing.check",
    "testing",
    "",
]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports, at any depth of its code."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "funcmlo":
                names |= {alias.name for alias in node.names}
            elif node.module and node.module.startswith("funcmlo."):
                module = node.module.removeprefix("funcmlo.")
                names |= {f"{module}.{a.name}" if f"{module}.{a.name}" in ORDER else module for a in node.names}
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("funcmlo") for alias in node.names), f"{path}: import it by name"
    return names


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_module_has_its_place() -> None:
    assert sorted(map(module_name, FILES)) == sorted(ORDER)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_run_one_way(path: Path) -> None:
    place = ORDER.index(module_name(path))
    for name in imported(path):
        assert name in ORDER, f"{path}: imports {name}, which has no place"
        assert ORDER.index(name) < place, f"{path}: imports {name}, which comes after it"


@pytest.mark.parametrize("path", [*FILES, *sorted((ROOT / "paper_repro").rglob("*.py"))], ids=str)
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300


def test_only_tree_touches_the_pytree_library() -> None:
    for path in FILES:
        if path.name != "_tree.py":
            text = path.read_text(encoding="utf-8")
            assert "optree" not in text.replace("of optree and of torch", "").replace("library optree knows", ""), path
            assert "_pytree" not in text, path


def test_public_names_are_sorted_and_documented() -> None:
    assert fm.__all__ == sorted(fm.__all__, key=lambda name: (name.upper() != name, name))
    for name in fm.__all__:
        assert getattr(fm, name).__doc__, name
