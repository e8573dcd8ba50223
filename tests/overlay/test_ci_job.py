# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The job that the series adds to upstream's CI: what it runs, and since which patch.

Upstream's own hook, which `make patch-test` runs, knows all of its jobs.
"""

from pathlib import Path

import pytest
import yaml

from overlay.base import ROOT
from overlay.series import checkout_files, covers, load_series

SERIES = load_series(ROOT / "overlay" / "upstream.toml")
PATHS = checkout_files(ROOT)
FILE = ".buildkite/test_areas/weight_sync.yaml"
(STEP,) = yaml.safe_load((ROOT / FILE).read_text())["steps"]
# "pytest -v -s distributed/weight_sync", in the folder of the tests.
FOLDERS = [f"tests/{command.split()[-1]}/" for command in STEP["commands"]]


def test_it_runs_what_no_job_of_upstreams_would():
    ours = [path for path in PATHS if path.startswith("tests/distributed/")]
    tests = [path for path in ours if Path(path).name.startswith("test_")]
    assert tests
    left = [p for p in tests if not any(covers(folder, p) for folder in FOLDERS)]
    assert not left, "expected in tests/distributed/weight_sync/, which a CI job runs"


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_it_runs_is_there_when_it_comes(folder):
    owner = SERIES.owner(FILE)
    assert owner is not None
    so_far = SERIES.patches[: SERIES.patches.index(owner) + 1]
    assert any(
        covers(folder, path)
        for patch in so_far
        for path in SERIES.brought(PATHS, patch)
    )


@pytest.mark.parametrize("path", STEP["source_file_dependencies"])
def test_what_starts_it_exists(path):
    assert any(covers(path, ours) for ours in PATHS)
