# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Upstream's hooks, on what the series changes in a tree of upstream's source."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from overlay.patch import FIRST_PARTY

CONFIG = ".pre-commit-config.yaml"
# Of the hooks in upstream's own source, those that judge Python and the jobs of CI.
# pre-commit makes their environments, with the versions that upstream names.
LOCAL_HOOKS = {
    "check-boolean-context-manager",
    "check-buildkite-step-keys",
    "check-filenames",
    "check-forbidden-imports",
    "check-root-lazy-imports",
    "check-spdx-header",
    "check-test-tethering",
    "check-torch-cuda-call",
    "check-trust-remote-code",
    "mypy",
    "validate-config",
}


def check_hooks(tree: Path, files: list[str]) -> int:
    """Run them on files of the tree, a repository.

    Returns:
        The exit status of the first that is not content, or 0.
    """
    for command in commands(tree, files):
        if status := subprocess.run(command, cwd=tree, env=_environment()).returncode:
            return status
    return 0


def commands(tree: Path, files: list[str]) -> Iterator[list[str]]:
    """Yield the commands that judge the files."""
    modules = [file for file in files if file.endswith(".py")]
    yield [_tool("ruff"), "check", "--quiet", *FIRST_PARTY, *modules]
    yield [_tool("ruff"), "format", "--check", "--quiet", *modules]
    yield [_tool("typos"), "--force-exclude", *files]
    config = tree.with_name(f"{tree.name}-hooks.yaml")
    config.write_text(yaml.safe_dump(local_hooks((tree / CONFIG).read_text())))
    yield [_tool("pre-commit"), "run", f"--config={config}", "--files", *files]


def local_hooks(config: str) -> dict[str, Any]:
    """Keep what needs nobody's repository of a configuration of pre-commit.

    Raises:
        ValueError: It lacks one of the hooks.
    """
    repos = yaml.safe_load(config)["repos"]
    hooks = [h for repo in repos if repo["repo"] == "local" for h in repo["hooks"]]
    kept = [hook for hook in hooks if hook["id"] in LOCAL_HOOKS]
    if missing := LOCAL_HOOKS - {hook["id"] for hook in kept}:
        names = ", ".join(sorted(missing))
        raise ValueError(f"{CONFIG}: expected {names}, not found; correct LOCAL_HOOKS")
    return {"repos": [{"repo": "local", "hooks": kept}]}


def _tool(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def _environment() -> dict[str, str]:
    # Hooks run `python` and `git`; none of them is to see this environment's packages.
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
