"""The other end of the pipes: starting a contender's process, and asking it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from paper_repro.peak import QUIET
from paper_repro.peers.child import Job

ROOT = Path(__file__).parents[2]


class DiedError(Exception):
    """A process ended when it was asked; the message has its last words."""


class Process:
    """A contender's process, which starts at once and is asked over pipes.

    Args:
        job: what it is for.
        quiet: whether its allocator gives back what is freed, so that peaks tell of what is held.
    """

    def __init__(self, job: Job, *, quiet: bool = False) -> None:
        self.job = job
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # ruff: ignore[open-file-with-context-handler] — closed by `end`
        self._process = subprocess.Popen(
            [sys.executable, "-m", "paper_repro.peers.child", job.written()],
            cwd=ROOT,
            env={**os.environ, **surroundings(job.threads), **(QUIET if quiet else {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def hear(self) -> Any:
        """Return the next answer.

        Returns:
            What the process wrote.

        Raises:
            DiedError: it ended.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._errors.seek(0)
            words = [line for line in self._errors.read().splitlines() if line.strip()]
            raise DiedError(f"its process ended with status {status}: {words[-1] if words else 'without a word'}")
        return json.loads(line)

    def ask(self, command: str) -> Any:
        """Return the answer to a command.

        Args:
            command: a line that `child` knows.

        Returns:
            What the process wrote.

        Raises:
            DiedError: it ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{command}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # its last words are heard next
        return self.hear()

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()


@contextmanager
def processes(jobs: Sequence[Job], *, quiet: bool = False) -> Generator[list[Process]]:
    """Start processes together, and end them whatever happens.

    Args:
        jobs: one for each.
        quiet: as for `Process`.

    Yields:
        The processes.
    """
    started: list[Process] = []
    try:
        for job in jobs:
            started.append(Process(job, quiet=quiet))
        yield started
    finally:
        for process in started:
            process.end()


def surroundings(threads: int) -> dict[str, str]:
    """Return the environment that a process has from its beginning: the same threads for torch and for XLA.

    Args:
        threads: how many. A process may run on so many cores too, which is what XLA's pool goes by.

    Returns:
        The variables.
    """
    found = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    single = "--xla_cpu_multi_thread_eigen=false" if threads == 1 else ""
    return found | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {single}".strip()}
