# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Apply the series to a fresh tree of upstream's source, and run tests in that tree.

The tree's Python runs with this environment's torch, without the base's compiled parts:
what multiplies by one of them cannot be tested this way.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from overlay.base import CUDA, OverlayError
from overlay.patch import write_patches
from overlay.source import extract_source, find_source
from tests.upstream.hooks import check_hooks

RELOAD = "tests/model_executor/model_loader/reload"
TESTS = (
    RELOAD,
    "tests/distributed/weight_sync",
    "tests/v1/engine/test_weight_fence.py",
    "tests/v1/engine/test_weight_state.py",
    "tests/v1/worker/test_rpc_failure.py",
    "tests/v1/worker/test_scale_guard.py",
    "tests/v1/worker/test_weight_report.py",
    "tests/v1/worker/test_weight_update_session.py",
)
# Of the tests of the reload, those that run a kernel of the compiled part, or Triton's
# without the fork's conftest, which has them interpreted.
NEED_KERNELS = (
    "checkpoint_files",
    "checkpoints_load",
    "plan",
    "property",
    "rollback",
    "route_table",
    "sync",
)
SENDER = {
    f"GIT_{role}_{key}": value
    for role in ("AUTHOR", "COMMITTER")
    for key, value in (("NAME", "Somebody"), ("EMAIL", "somebody@example.com"))
}


def main() -> int:
    """Return the exit status: 0 if the series applies and the tests pass."""
    parser = argparse.ArgumentParser(
        "python -m tests.upstream.patched", description=__doc__
    )
    parser.add_argument("--base", default=CUDA.default_version, help="%(default)s")
    version = parser.parse_args().base
    with tempfile.TemporaryDirectory(prefix="patched-") as name:
        folder = Path(name)
        try:
            source = find_source(version)
            write_patches(source, version, folder / "patches")
        except OverlayError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        tree = extract_source(source, folder / "tree")
        count = apply(tree, sorted((folder / "patches").glob("*.patch")))
        print(f"vllm {version}: {count} patches applied", flush=True)
        if status := check_hooks(tree, changed(tree)):
            return status
        print("upstream's hooks are content", flush=True)
        return run_tests(tree)


def apply(tree: Path, patches: list[Path]) -> int:
    """Apply a series to a tree as upstream's maintainers would; return its length."""
    git(tree, "init", "--quiet")
    git(tree, "add", "--all", "--force")
    git(tree, "commit", "--quiet", "--message=base")
    git(tree, "tag", "base")
    git(tree, "am", "--quiet", "--keep-non-patch", *map(str, patches))
    return int(git(tree, "rev-list", "--count", "base..HEAD"))


def changed(tree: Path) -> list[str]:
    """Return the files that the series added or changed."""
    return git(tree, "diff", "--name-only", "base").splitlines()


def run_tests(tree: Path) -> int:
    """Run the fork's tests in the tree; return pytest's exit status."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree),
        "VLLM_TARGET_DEVICE": "cpu",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    left_out = [f"--ignore={RELOAD}/test_{name}.py" for name in NEED_KERNELS]
    return subprocess.run([*command, *left_out], cwd=tree, env=environment).returncode


def git(tree: Path, *arguments: str) -> str:
    """Run git in the tree and return what it printed."""
    run = subprocess.run(
        ["git", "-c", "gc.auto=0", *arguments],
        cwd=tree,
        env={**os.environ, **SENDER, "GIT_CONFIG_GLOBAL": os.devnull},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return run.stdout


if __name__ == "__main__":
    sys.exit(main())
