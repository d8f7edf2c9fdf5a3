"""The README's code runs as it is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_readme_has_code() -> None:
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_code_runs(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    # Later blocks go on where earlier ones stopped, as a reader does.
    torch.manual_seed(0)
    scope: dict[str, object] = {"__name__": "readme"}
    for block in BLOCKS[: number + 1]:
        exec(compile(block, "README.md", "exec"), scope)
    printed = capsys.readouterr().out
    for expected in re.findall(r"print\(.*\)  # (.+)", BLOCKS[number]):
        assert expected in printed, expected
