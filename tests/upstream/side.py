# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""One side of the comparison: a vLLM, and a run of upstream's tests on it."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Timer

from tests.upstream.comparison import Outcomes, read_outcomes

# pytest ends: all passed, or some failed. Anything else is no result.
COMPLETED = (0, 1)
_PERCENT = re.compile(r"\[ *(\d+)%\]")


class SideError(RuntimeError):
    """A side could not be run to its end."""


@dataclass(frozen=True)
class Side:
    """A vLLM on which upstream's tests are run.

    Attributes:
        name: "base" or "fork".
        home: folder in which this side's vLLM must lie.
        python_path: what `PYTHONPATH` is set to.
        checkout: folder of upstream's tests, from which they run.
        tests: their files, relative to it.
        reports: folder for the log and the results.
        timeout: seconds that the run may take.
    """

    name: str
    home: Path
    python_path: str
    checkout: Path
    tests: list[str]
    reports: Path
    timeout: int

    @property
    def log(self) -> Path:
        return self.reports / f"{self.name}.log"

    @property
    def results(self) -> Path:
        return self.reports / f"{self.name}.xml"

    @property
    def environment(self) -> dict[str, str]:
        """Variables of the run, which its subprocesses inherit."""
        return {
            **os.environ,
            "PYTHONPATH": self.python_path,
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "PYTHONUNBUFFERED": "1",  # progress as it is made
        }

    def run(self, show: Callable[[int], None]) -> None:
        """Run the tests.

        Args:
            show: told the percentage of tests that are done.

        Raises:
            SideError: another vLLM would be tested, the time was up, or pytest broke.
        """
        self._check_origin()
        self.results.unlink(missing_ok=True)
        options = ["-v", "-p", "no:cacheprovider", f"--junitxml={self.results}"]
        run = self._start("-m", "pytest", *options, *self.tests)
        timer = Timer(self.timeout, os.killpg, (run.pid, signal.SIGKILL))
        timer.start()
        try:
            self._follow(run, show)
        finally:
            timer.cancel()
        if run.wait() not in COMPLETED:
            raise SideError(f"{self.name}: {self._ending(run.returncode)}")

    def outcomes(self) -> Outcomes:
        """The outcome of each test of the last run."""
        return read_outcomes(self.results)

    def _check_origin(self) -> None:
        run = self._start("-c", "import vllm; print(vllm.__file__)")
        printed, _ = run.communicate()
        origin = Path(printed.splitlines()[-1]) if run.returncode == 0 else None
        if origin is None or not origin.is_relative_to(self.home):
            raise SideError(
                f"{self.name}: expected vLLM in {self.home}, got: {printed[-2000:]}"
            )

    def _start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=self.checkout,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # so that a timeout ends its subprocesses too
        )

    def _follow(self, run: subprocess.Popen[str], show: Callable[[int], None]) -> None:
        assert run.stdout is not None
        with self.log.open("w", buffering=1) as log:
            for line in run.stdout:
                log.write(line)
                for percent in _PERCENT.findall(line):
                    show(int(percent))

    def _ending(self, status: int) -> str:
        if status == -signal.SIGKILL:
            return f"killed, after {self.timeout} s at the latest; see {self.log}"
        return f"pytest ended with status {status}; see {self.log}"
