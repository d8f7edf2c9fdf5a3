"""What an experiment is to the command line, and how its cells are swept."""

from __future__ import annotations

import ast
import functools
import hashlib
import platform
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
import torchopt

import funcmlo
from funcmlo.errors import DefinitionError, listing, suggest
from paper_repro.sweep import SweepError, grid, share, sweep


@dataclass(frozen=True)
class Request:
    """What the user asked for on the command line.

    Attributes:
        dataset: one of the experiment's data sets.
        preset: one of the experiment's presets.
        methods: some of the experiment's methods, in order.
        seeds: how many seeds, counted from 0.
        out: the folder that results go to; it exists.
        data_dir: where data sets are looked for first; None for the usual places.
        jobs: how many cells run at a time.
        dask: a Dask scheduler's address; None runs the cells on this machine.
        fresh: whether finished cells in `out` are run again.
        changes: texts of the values that a preset's settings take, by the setting's name.
    """

    dataset: str
    preset: str
    methods: tuple[str, ...]
    seeds: int
    out: Path
    data_dir: Path | None = None
    jobs: int = 1
    dask: str | None = None
    fresh: bool = False
    changes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """A benchmark that the command line can run.

    Attributes:
        name: its name on the command line.
        summary: one line for `list`.
        source: the papers it reproduces.
        datasets: names for `--dataset`, the default first.
        presets: settings by name for `--preset`.
        methods: names for `--methods`.
        run: runs a request, prints its table, writes into the request's folder, and returns the paths written.
    """

    name: str
    summary: str
    source: str
    datasets: Sequence[str]
    presets: Mapping[str, Any]
    methods: Sequence[str]
    run: Callable[[Request], Sequence[Path]]


@dataclass(frozen=True)
class Swept:
    """What a request's cells came to under one choice of the settings.

    Attributes:
        title: the settings that are varied, such as `inner=10`; empty if none is.
        settings: the settings.
        out: the folder for the results; it exists.
        threads: how many torch used in each cell.
        rows: what the cells returned, seed by seed.
    """

    title: str
    settings: Any
    out: Path
    threads: int
    rows: list[Any]


def swept(
    request: Request,
    name: str,
    settings: Any,
    cell: Callable[..., Any],
    methods: Sequence[str],
    *,
    header: Callable[[Any], str],
    line: Callable[[Any], str],
    **constants: Any,
) -> list[Swept]:
    """Run the cells (method, seed, setting) of a request; those that its folder has are not run again.

    Args:
        request: what the user asked for.
        name: the experiment's.
        settings: the preset's.
        cell: takes `settings`, `method`, `seed` and the constants by name, and returns plain data.
        methods: the rows of each seed, in order.
        header: what is printed before the cells run, for each choice of the settings.
        line: what is printed when a cell is done, of what it returned.
        constants: what every cell takes besides, and what decides no number.

    Returns:
        One for each choice of the settings.
    """
    variants = varied(settings, request.changes)
    for title, chosen in variants.items():
        print(f"{title}: {header(chosen)}" if title else header(chosen), flush=True)
    usual = 1 if request.dask else share(request.jobs)

    def threads(of: Any) -> int:
        return getattr(of, "threads", 1) or usual

    cells = grid(settings=list(variants.values()), seed=range(request.seeds), method=methods)
    expected = versions()

    def one(**values: Any) -> Any:
        return _checked(cell, expected, constants, values)

    def label(values: Mapping[str, Any]) -> str:
        title = next(title for title, chosen in variants.items() if chosen == values["settings"])
        return f"{title}  seed {values['seed']}  {values['method']}".strip()

    with _cluster(request.dask):
        rows = sweep(
            one,
            cells,
            jobs=request.jobs,
            backend="dask" if request.dask else None,
            out=request.out,
            fresh=request.fresh,
            threads=lambda values: threads(values["settings"]),
            version={"experiment": name, "preset": request.preset, "dataset": request.dataset, **expected},
            tell=partial(print, flush=True),
            label=label,
            line=line,
        )
    size, found = request.seeds * len(methods), []
    for i, (title, chosen) in enumerate(variants.items()):
        out = request.out / title
        out.mkdir(exist_ok=True)
        found.append(Swept(title, chosen, out, threads(chosen), rows[i * size : (i + 1) * size]))
    return found


def _checked(
    function: Callable[..., Any], expected: Mapping[str, str], constants: Mapping[str, Any], values: Mapping[str, Any]
) -> Any:
    """Run a cell, unless this process has other code than the one that asks."""
    mine = versions()
    other = [f"{name} {mine[name]}, not {expected[name]}" for name in expected if mine[name] != expected[name]]
    if other:
        raise SweepError(f"the process that runs this cell on {platform.node()} has {', '.join(other)}.")
    return function(**values, **constants)


@functools.cache
def versions() -> dict[str, str]:
    """Return what a result depends on besides its cell: the libraries' versions, and a digest of the code itself."""
    code = hashlib.sha256()
    for module in (funcmlo.__file__, __file__):
        for path in sorted(Path(module).parent.rglob("*.py")):
            code.update(path.relative_to(Path(module).parent).as_posix().encode() + b"\0" + path.read_bytes())
    return {
        "funcmlo": funcmlo.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchopt": torchopt.__version__,
        "numpy": numpy.__version__,
        "code": code.hexdigest()[:16],
    }


def varied(settings: Any, changes: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return the settings for every combination of changes.

    Args:
        settings: a dataclass.
        changes: texts of the values that its fields take.

    Returns:
        The settings by title, which says the fields that take several values.

    Raises:
        DefinitionError: there is no such field, or a value is of another type.

    Example:
        >>> from paper_repro.peers_correctness.run import Settings
        >>> varied(Settings(condition=10.0, images=32, updates=20), {"images": ["8", "16"], "updates": ["5"]})["images=16"]
        Settings(condition=10.0, images=16, updates=5)
    """
    values = {name: [_value(settings, name, text) for text in dict.fromkeys(texts)] for name, texts in changes.items()}
    several = [name for name, texts in values.items() if len(texts) > 1]
    return {",".join(f"{name}={chosen[name]}" for name in several): replace(settings, **chosen) for chosen in grid(**values)}


def _value(settings: Any, name: str, text: str) -> Any:
    known = [one.name for one in fields(settings)]
    if name not in known:
        raise DefinitionError(f"'{name}' is no setting{suggest(name, known)} Settings: {listing(known)}.")
    now = getattr(settings, name)
    kind = int if now is None else type(now)
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        value = None
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise DefinitionError(f"{name}={text} came; expected a value like {now!r}, of type {kind.__name__}.")
    return value


@contextmanager
def _cluster(address: str | None) -> Generator[None, None, None]:
    """Connect to a Dask scheduler, if an address is given."""
    if address is None:
        yield
        return
    from paper_repro.dask_backend import connect

    with connect(address):
        yield
