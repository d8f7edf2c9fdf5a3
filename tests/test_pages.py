"""The code of the README and of the documentation's pages runs as it is written, and prints what is written there."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch

import funcmlo as fm

ROOT = Path(__file__).parents[1]
PAGES = {page.name: page for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
BLOCKS = {
    name: re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL) for name, page in PAGES.items()
}
CASES = [(name, number) for name, blocks in BLOCKS.items() for number in range(len(blocks))]


def test_the_pages_have_code() -> None:
    assert len(BLOCKS["README.md"]) >= 2
    assert len(BLOCKS["hierarchies.md"]) >= 6


@pytest.mark.parametrize(("page", "number"), CASES)
def test_code_runs(page: str, number: int, capsys: pytest.CaptureFixture[str]) -> None:
    # Later blocks go on where earlier ones stopped, as a reader does.
    torch.manual_seed(0)
    scope: dict[str, object] = {"__name__": "page"}
    for block in BLOCKS[page][: number + 1]:
        with warnings.catch_warnings():
            if "# warns" in block:
                warnings.simplefilter("ignore", fm.FuncmloWarning)
            exec(compile(block, page, "exec"), scope)
    printed = capsys.readouterr().out
    for expected in re.findall(r"print\(.*\)  # (.+)", BLOCKS[page][number]):
        assert expected in printed, expected
    for written in re.findall(r"print\(.*\)\n((?:# .*\n)+)", BLOCKS[page][number]):
        assert "".join(line[2:] for line in written.splitlines(keepends=True)) in printed


def test_the_picture_of_the_four_problems_is_up_to_date() -> None:
    scope: dict[str, object] = {"__name__": "page"}
    exec(compile(BLOCKS["hierarchies.md"][0], "hierarchies.md", "exec"), scope)
    assert scope["four"].graph.svg() == (ROOT / "docs" / "four-problems.svg").read_text(encoding="utf-8")
