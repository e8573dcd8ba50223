# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What makes a fork stale, and what does not."""

import os
import subprocess
import sys

import pytest

from overlay.base import CPU, ROOT, Base
from overlay.fork import Fork

PRINT_DIGEST = """
import sys; from pathlib import Path
from overlay.base import CPU, Base; from overlay.fork import Fork
print(Fork.of(Base(CPU, "0.32.0"), Path(sys.argv[1])).digest())
"""


def test_the_digest_is_that_of_every_process(checkout):
    command = [sys.executable, "-c", PRINT_DIGEST, str(checkout.root)]
    digests = [
        subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("path", "is_stale"),
    [
        ("vllm/one_more.py", True),
        ("overlay/edits/one_more.toml", True),
        ("vllm/replaced.py", False),
        ("vllm/__pycache__/replaced.pyc", False),
        ("vllm/.replaced.py.swp", False),
    ],
)
def test_a_fork_is_stale_if_files_or_edits_differ(wheel, checkout, path, is_stale):
    before = checkout.fork(wheel).digest()
    edits = (checkout.root / "overlay/edits/cli.toml").read_text()
    checkout.write(path, edits if path.endswith(".toml") else "NEW = 1\n")
    assert (checkout.fork(wheel).digest() != before) == is_stale


def test_another_base_makes_another_fork(checkout):
    forks = [Fork.of(Base(CPU, v), checkout.root) for v in ("0.22.1", "0.32.0")]
    assert forks[0].digest() != forks[1].digest()
