"""The code of the README and of the documentation's pages runs as it is written, and prints what is written there."""

from __future__ import annotations

import inspect
import os
import re
import warnings
from pathlib import Path

import pytest
import torch

import funcmlo as fm

ROOT = Path(__file__).parents[1]
INDEX = "docs/estimators/README.md"
PAGES = {page.relative_to(ROOT).as_posix(): page for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]}
BLOCKS = {
    name: re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL) for name, page in PAGES.items()
}
ESTIMATORS = {name: page for name, page in PAGES.items() if name.startswith("docs/estimators/") and name != INDEX}
LINKS = {
    name: [
        os.path.normpath(page.parent.relative_to(ROOT) / link)
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    ]
    for name, page in PAGES.items()
}


def test_the_pages_have_code() -> None:
    assert len(BLOCKS["README.md"]) >= 2
    assert len(BLOCKS["docs/hierarchies.md"]) >= 6
    for name in ESTIMATORS:
        assert "print(" in "".join(BLOCKS[name]), f"{name} shows no number"


def parts() -> list[str]:
    """The estimators, linear solvers and curvatures that users can name."""
    bases = (fm.BestResponse, fm.LinearSolver, fm.Curvature)
    public = {name: getattr(fm, name) for name in fm.__all__}
    return [
        name
        for name, part in public.items()
        if isinstance(part, type) and issubclass(part, bases) and not inspect.isabstract(part)
    ]


def test_there_are_parts_to_describe() -> None:
    assert {"ITD", "AID", "CG", "Resampled"} <= set(parts())
    assert not {"BestResponse", "LinearSolver", "Curvature", "Checkpoint"} & set(parts())


@pytest.mark.parametrize("part", parts())
def test_every_part_has_a_page(part: str) -> None:
    # The index names all of them in its table; one of the pages must, too.
    named = re.compile(rf"\b{part}\(")
    assert any(named.search(page.read_text(encoding="utf-8")) for page in ESTIMATORS.values()), f"no page has {part}(…)"


def test_the_index_has_every_page() -> None:
    linked = {link for link in LINKS[INDEX] if link in PAGES}
    assert not set(ESTIMATORS) - linked


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    assert [link for link in LINKS[page] if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("page", [name for name, blocks in BLOCKS.items() if blocks])
def test_code_runs(page: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.chdir(tmp_path)  # for what a page writes
    # Later blocks go on where earlier ones stopped, as a reader does.
    torch.manual_seed(0)
    scope: dict[str, object] = {"__name__": "page"}
    for number, block in enumerate(BLOCKS[page], 1):
        with warnings.catch_warnings():
            if "# warns" in block:
                warnings.simplefilter("ignore", fm.FuncmloWarning)
            exec(compile(block, f"{page}, block {number}", "exec", dont_inherit=True), scope)
        printed = capsys.readouterr().out
        # A print over several lines ends with its closing parenthesis and what it prints.
        for expected in re.findall(r"(?:print\(.*|^)\)  # (.+)", block, re.MULTILINE):
            assert expected in printed, f"block {number}: {expected}"
        for written in re.findall(r"print\(.*\)\n((?:# .*\n)+)", block):
            assert "".join(line[2:] for line in written.splitlines(keepends=True)) in printed, f"block {number}"


def test_the_picture_of_the_four_problems_is_up_to_date() -> None:
    scope: dict[str, object] = {"__name__": "page"}
    exec(compile(BLOCKS["docs/hierarchies.md"][0], "hierarchies.md", "exec"), scope)
    assert scope["four"].graph.svg() == (ROOT / "docs" / "four-problems.svg").read_text(encoding="utf-8")
