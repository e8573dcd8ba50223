# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Each command in the pages is run: here, by another test, or not, for a reason."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from overlay.base import ROOT
from tests.checkpoints import CASES, write_checkpoint
from tests.docs.commands import commands

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]

# What is run here in the place of each; braces are for the test's own paths.
RUN = {
    "python -m benchmarks.reload_check CHECKPOINT A": (
        "python -m benchmarks.reload_check {b} {a}"
    ),
    "VLLM_RELOAD_REPORT=$PWD/build/report.json python -m benchmarks.sync --layers 2 "
    "--repeats 1": (
        "VLLM_RELOAD_REPORT={folder}/report.json python -m benchmarks.sync --layers 1 "
        "--experts 8 --repeats 1"
    ),
}

RUN_BY = {
    "git am --keep-non-patch .../dist/upstream/*.patch": (
        "tests/overlay/test_patch.py::test_git_am_takes_the_series"
    ),
    "python -m benchmarks.sync.timeline FILE timeline.png": (
        "tests/model_executor/model_loader/reload/test_timeline.py::test_it_needs_no_colours"
    ),
    "make docs": "tests/docs/test_site.py::test_each_page_is_there",
    "make wheel [BASE=0.22.1]": (
        "tests/overlay/test_wheel.py::test_the_fork_lies_over_the_base"
    ),
    "python -m overlay lay DIR": (
        "tests/overlay/test_tree.py::test_the_fork_lies_over_the_base"
    ),
    "VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model MODEL "
    """--api-key KEY --weight-transfer-config '{"backend": "shm"}'""": (
        "tests/entrypoints/rl/test_shm_sync.py::test_the_trainer_of_the_readme_works"
    ),
    "vllm reload-check CHECKPOINT [--against A] [--json]": (
        "tests/entrypoints/unit_tests/test_reload_check.py::test_the_real_command"
    ),
    "vllm reload-check --report FILE [--json]": (
        "tests/entrypoints/unit_tests/test_reload_check.py::test_report_as_json"
    ),
}

MINUTES = "takes minutes"
GPU = "needs a GPU"
INSTALLS = "installs into the environment that runs the tests"
DOWNLOADS = "downloads upstream's source"
TESTS = "runs these tests"

NOT_RUN = {
    "make bench": MINUTES,
    "make demo": MINUTES,
    "make gpu-bench": GPU,
    "make gpu-test": GPU,
    "make lint": "is a step of its own beside the tests",
    "make patch [BASE=0.33.0]": DOWNLOADS,
    "make patch-test [BASE=0.33.0]": DOWNLOADS,
    "make quick": TESTS,
    "make soak [SCHEDULES=5000] [SYNCS=200]": MINUTES,
    "make test": TESTS,
    "make upstream-test": DOWNLOADS,
    "make venv": INSTALLS,
    "make venv [BASE=0.22.1]": INSTALLS,
    "pip install .": INSTALLS,
    "python -m benchmarks.kernels.moe.tune --model Qwen3-30B-A3B": GPU,
    "python -m benchmarks.sync --model Qwen3-30B-A3B --layers 16 --bucket 1073741824": (
        GPU
    ),
    (
        "python -m benchmarks.sync.growth --model Qwen3-30B-A3B --layers 8 "
        "--sweeps bucket"
    ): GPU,
    (
        "OMP_NUM_THREADS=1 python -m benchmarks.sync.disk --repeats 9 --out "
        "build/disk.json"
    ): MINUTES,
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, Path]:
    """What stands for the words in capitals."""
    folder = tmp_path_factory.mktemp("commands")
    case = CASES["qwen3_moe-fp8_block"]
    for seed, name in enumerate(("a", "b"), start=1):
        write_checkpoint(case, seed, folder / name)
    return {"folder": folder, "a": folder / "a", "b": folder / "b"}


def told() -> set[str]:
    return {command for page in PAGES for command in commands(page)}


def test_each_command_is_accounted_for():
    assert told() == {*RUN, *RUN_BY, *NOT_RUN}


def test_no_command_is_accounted_for_twice():
    assert len({*RUN, *RUN_BY, *NOT_RUN}) == len(RUN) + len(RUN_BY) + len(NOT_RUN)


@pytest.mark.parametrize("command", RUN)
def test_a_command_works(command, paths):
    run = RUN[command].format(**paths).replace("python ", f"{sys.executable} ")
    done = subprocess.run(
        run, shell=True, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("test", RUN_BY.values(), ids=lambda test: test)
def test_the_test_that_runs_it_exists(test):
    file, _, name = test.partition("::")
    assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", [c for c in NOT_RUN if c.startswith("make ")])
def test_make_knows_the_target(command):
    dry = shlex.split(re.sub(r"\[(.*?)\]", r"\1", command)) + ["--dry-run"]
    subprocess.run(dry, cwd=ROOT, env=os.environ, check=True, capture_output=True)


@pytest.mark.parametrize("command", [c for c in NOT_RUN if c.startswith("python ")])
def test_the_module_knows_the_options(command):
    _, _, module, *arguments = shlex.split(command)
    place = ROOT / module.replace(".", "/")
    folder = place if place.is_dir() else place.parent
    sources = "".join(file.read_text() for file in folder.glob("*.py"))
    options = [a.removeprefix("--") for a in arguments if a.startswith("--")]
    assert options
    assert all(re.search(f'"(--)?{option}"', sources) for option in options)


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("    make a  # why\n    make b\n", ["make a", "make b"]),
        ("    A=1 python -m b \\\n        --c\n", ["A=1 python -m b --c"]),
        ("```bash\nvllm a\n```\n", ["vllm a"]),
        ("```python\nmake = 1\n    make a\n```\n", []),
        ("    make: said a log\n    A=1\n", []),
        ("make a\n", []),
    ],
)
def test_what_counts_as_a_command(page, expected, tmp_path):
    file = tmp_path / "page.md"
    file.write_text(page)
    assert commands(file) == expected
