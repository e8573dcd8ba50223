# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which of upstream's hooks judge the series."""

import pytest
import yaml

from tests.upstream.hooks import LOCAL_HOOKS, local_hooks


def config(*hooks: str) -> str:
    """A configuration with these local hooks, and one from somebody's repository."""
    local = {"repo": "local", "hooks": [{"id": hook} for hook in hooks]}
    remote = {"repo": "https://example.com", "hooks": [{"id": "mypy"}]}
    return yaml.safe_dump({"repos": [remote, local]})


def test_local_ones_that_are_named_are_kept():
    (repo,) = local_hooks(config("other", *LOCAL_HOOKS))["repos"]
    assert repo["repo"] == "local"
    assert {hook["id"] for hook in repo["hooks"]} == LOCAL_HOOKS


def test_one_that_is_gone_is_named():
    with pytest.raises(ValueError, match="expected mypy, not found"):
        local_hooks(config(*LOCAL_HOOKS - {"mypy"}))
