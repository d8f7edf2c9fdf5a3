"""Starting scripts in several processes, as torchrun does, and hearing what they found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
MARK = "found "


def launch(*script: str, processes: int = 2, check: bool = True, options: tuple[str, ...] = ()) -> tuple[dict, str]:
    """Run `-m module …` or a file under torchrun.

    Returns:
        What it told by `tests.workers.tell`, by name; and all of its output.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *script],
        env=environment,
        cwd=ROOT,
        timeout=300,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert not check or done.returncode == 0, done.stdout[-6000:]
    told = [json.loads(line.removeprefix(MARK)) for line in done.stdout.splitlines() if line.startswith(MARK)]
    return {one["name"]: one for one in told}, done.stdout
