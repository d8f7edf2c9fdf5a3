"""The notebooks run as they are stored, and what is stored is what they give.

Jupyter is not needed: a notebook is JSON, and its code cells are run in order in one namespace. A cell tagged "varies" shows
what may change from machine to machine, or with the number of checks that there are: the kinds of its outputs are compared,
and their text is not. To store the outputs anew: `jupyter nbconvert --to notebook --execute --inplace notebooks/NAME.ipynb`.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
BOOKS = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.ipynb"))}
CELLS = {
    f"{name}-{cell['id']}": (name, i)
    for name, book in BOOKS.items()
    for i, cell in enumerate(book["cells"])
    if cell["cell_type"] == "code"
}
ABSOLUTE = re.compile(r"""(?:^|[\s"'(=])(?:file://|/(?:home|root|Users|tmp|work|opt|usr|mnt|var|private)/|~/|[A-Z]:\\)""")


@dataclass(frozen=True)
class Output:
    """What a cell showed: what it printed, its last expression's value as text, and the kinds of everything richer."""

    printed: str = ""
    value: str = ""
    kinds: frozenset[str] = frozenset()


def stored(cell: dict[str, Any]) -> Output:
    """What the file has for a cell."""
    printed, value, kinds = "", "", set[str]()
    for output in cell["outputs"]:
        if output["output_type"] == "stream":
            printed += "".join(output["text"])
            kinds |= {output["name"]} - {"stdout"}
        else:
            kinds |= set(output["data"]) - {"text/plain"}
            if output["output_type"] == "execute_result":
                value += "".join(output["data"]["text/plain"])
    return Output(printed, value, frozenset(kinds))


def shown(source: str, name: str, scope: dict[str, Any]) -> Output:
    """What a cell shows when it is run: as in Jupyter, the value of a last expression, and figures that are open."""
    import matplotlib.pyplot as plt

    tree = ast.parse(source, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    value, kinds, out = "", set[str](), io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(tree, name, "exec", dont_inherit=True), scope)
        if isinstance(last, ast.Expr):
            result = eval(compile(ast.Expression(last.value), name, "eval", dont_inherit=True), scope)
            if result is not None and not source.rstrip().endswith(";"):
                value = repr(result)
                kinds |= {"text/html"} if hasattr(result, "_repr_html_") else set()
    if plt.get_fignums():
        kinds.add("image/png")
        plt.close("all")
    return Output(out.getvalue(), value, frozenset(kinds))


@functools.cache
def ran(name: str) -> tuple[dict[int, Output], Exception | None]:
    """What the cells of a notebook show, up to the first that fails; it is run once, from top to bottom."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    scope: dict[str, Any] = {"__name__": "__main__"}
    outputs: dict[int, Output] = {}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(plt, "show", lambda *args, **kwargs: None)  # Agg has no window to show; figures stay open
        plt.close("all")  # other tests' figures
        for i, cell in enumerate(BOOKS[name]["cells"]):
            if cell["cell_type"] == "code":
                try:
                    outputs[i] = shown("".join(cell["source"]), f"{name}, cell {cell['id']}", scope)
                except Exception as error:
                    return outputs, error
    return outputs, None


def test_there_are_notebooks() -> None:
    assert "verify.ipynb" in BOOKS


@pytest.mark.parametrize("key", CELLS)
def test_a_cell_gives_what_is_stored(key: str) -> None:
    name, i = CELLS[key]
    outputs, error = ran(name)
    if i not in outputs:
        assert error is not None
        raise error
    cell = BOOKS[name]["cells"][i]
    found, expected = outputs[i], stored(cell)
    assert found.kinds == expected.kinds
    if "varies" in cell["metadata"].get("tags", ()):
        assert bool(found.printed) == bool(expected.printed)
        assert bool(found.value) == bool(expected.value)
    else:
        assert found == expected


@pytest.mark.parametrize("name", BOOKS)
def test_a_notebook_was_run_from_top_to_bottom(name: str) -> None:
    cells = [cell for cell in BOOKS[name]["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output["output_type"] for cell in cells for output in cell["outputs"]}
    assert kinds <= {"stream", "execute_result", "display_data"}, "a cell failed"
    assert any(cell["outputs"] for cell in cells), "outputs are not stored"


@pytest.mark.parametrize("name", BOOKS)
def test_a_notebook_is_of_no_machine(name: str) -> None:
    book = BOOKS[name]
    assert (book["nbformat"], book["nbformat_minor"] >= 5) == (4, True)
    assert book["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in book["cells"]]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-z0-9-]+", one) for one in ids), "ids are words, so that a change shows as one"
    text = [
        line
        for cell in book["cells"]
        for part in [cell, *cell.get("outputs", ())]
        for line in [*part.get("source", ()), *part.get("text", ()), *_texts(part.get("data", {}))]
    ]
    assert [line for line in text if ABSOLUTE.search(line)] == []
    assert str(Path.home()) + os.sep not in "".join(text)


def _texts(data: dict[str, Any]) -> list[str]:
    return [line for kind, lines in data.items() if kind.startswith("text/") for line in lines]


@pytest.mark.parametrize("name", BOOKS)
def test_links_lead_somewhere(name: str) -> None:
    text = "".join("".join(cell["source"]) for cell in BOOKS[name]["cells"] if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert [link for link in links if not (FOLDER / link).exists()] == []
