# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""One side of the comparison: a vLLM that processes of their own measure."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Timer
from zipfile import ZipFile

from demo.measurement import Measurement, Outcome
from overlay.base import ROOT, find_wheel

# A process that hangs, as a broken engine may, is killed after so many seconds.
PATIENCE = 240
QUIET = dict(
    HF_HUB_OFFLINE="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
)
# The first error that a worker logs is the cause of those that follow.
ERROR = re.compile(r"\b\w+Error: [^\n:]+")


@dataclass(frozen=True)
class Side:
    """A vLLM and the settings it is measured with.

    Attributes:
        title: What the table calls it.
        log: Where its processes write what they have to say.
        environment: What is set for them.
    """

    title: str
    log: Path
    environment: dict[str, str]

    def measure(self, module: str, *arguments: str) -> Iterator[Measurement]:
        """Run a measuring module and yield what it measured, as it comes.

        Raises:
            RuntimeError: The process failed.
        """
        before = len(self._said())
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=os.environ | QUIET | self.environment,
        )
        watchdog = Timer(PATIENCE, process.kill)
        watchdog.start()
        try:
            for measurement in self._read(process):
                yield self._explained(measurement, before)
        finally:
            watchdog.cancel()
        if process.wait():
            tail = "\n".join(self._said().splitlines()[-20:])
            raise RuntimeError(f"{self.title}: {module} failed\n{tail}")

    def _read(self, process: subprocess.Popen) -> Iterator[Measurement]:
        """Yield the measurements among the lines; the others go to the log."""
        assert process.stdout is not None
        for line in process.stdout:
            measurement = Measurement.read(line)
            if measurement is not None:
                yield measurement
                continue
            with self.log.open("a") as log:
                log.write(line)

    def _explained(self, measurement: Measurement, before: int) -> Measurement:
        """Add why an engine does not start: its own error only says to look above."""
        if measurement.outcome is not Outcome.ABSENT:
            return measurement
        cause = ERROR.search(self._said()[before:])
        detail = cause.group() if cause else measurement.error
        return replace(measurement, detail=detail)

    def _said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


def released(tree: Path, folder: Path) -> Side:
    """The base as it was released, unpacked into `tree` from its wheel."""
    wheel = find_wheel()
    with ZipFile(wheel.path) as archive:
        archive.extractall(tree)
    title = f"released vLLM {wheel.base.version}"
    return Side(title, folder / "released.log", dict(PYTHONPATH=str(tree)))


def fork(folder: Path, commit: str) -> Side:
    """The fork in this environment, which commits per "layer" or per "model"."""
    report = folder / f"report-{commit}.json"
    settings = dict(
        VLLM_RELOAD_COMMIT=commit, VLLM_RELOAD_REPORT=str(report), PYTHONPATH=""
    )
    return Side("this fork", folder / f"fork-{commit}.log", settings)
