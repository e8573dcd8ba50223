# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The changelog knows the version that is built."""

import re

from overlay.base import FORK_VERSION, ROOT

VERSION = re.compile(r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$", re.MULTILINE)


def test_the_newest_version_is_the_forks():
    newest, *_ = VERSION.findall((ROOT / "CHANGELOG.md").read_text())
    assert f"reload.{newest}" == FORK_VERSION
