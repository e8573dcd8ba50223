# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Writing the series as files that `git am` takes."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from overlay.base import CUDA, ROOT, Base
from overlay.fork import Fork
from overlay.series import Patch, SeriesError, Tree, load_series
from overlay.source import extract_source

# Upstream's, by which its linter judges the patches.
SETTINGS = "pyproject.toml"
# Of which ruff sees only what the series touches.
FIRST_PARTY = ["--config", 'lint.isort.known-first-party=["examples", "tests", "vllm"]']
# Who sends the patches puts a name there; git's own settings come first.
SENDER = {"user.name": "Sender", "user.email": "sender@example.com"}


def write_patches(source: Path, version: str, out: Path, root: Path = ROOT) -> None:
    """Write the fork of a base as a series of patches.

    Args:
        source: The base's source distribution.
        version: Public version of the base.
        out: Folder for the patches; those that it holds are replaced.
        root: The checkout.

    Raises:
        EditError: An edit does not fit the base.
        SeriesError: The series does not fit the checkout or the base.
    """
    series = load_series(root / "overlay" / "upstream.toml")
    fork = Fork.of(Base(CUDA, version), root)
    with tempfile.TemporaryDirectory() as folder:
        touched = {*series.touched(fork, root), SETTINGS}
        base = extract_source(source, Path(folder, "base"), touched.__contains__)

        def read_base(path: str) -> str | None:
            file = base / path
            return file.read_text() if file.is_file() else None

        trees = series.trees(fork, root, read_base)
        repository = Repository(Path(folder, "repository"))
        repository.commit_base(base)
        for patch, tree in zip(series.patches, trees, strict=True):
            repository.commit(tree, message(patch))
        repository.write_patches(out)


def message(patch: Patch) -> str:
    """Return a patch's commit message."""
    return f"{patch.title}\n\n{patch.body}\n"


class Repository:
    """A repository of nothing but the files that the series touches."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self._git("init", "--quiet")
        self._git("config", "core.autocrlf", "false")
        for key, value in SENDER.items():
            self._git("config", key, _setting(key) or value)

    def commit_base(self, base: Path) -> None:
        """Commit the base's files, with their modes."""
        shutil.copytree(base, self.folder, dirs_exist_ok=True)
        self._commit("base")

    def commit(self, tree: Tree, message: str) -> None:
        """Commit the files of a tree beside what is there already.

        Raises:
            SeriesError: They change nothing.
        """
        for path, content in tree.items():
            file = self.folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        self._tidy([path for path in tree if path.endswith(".py")])
        self._commit(message)

    def write_patches(self, out: Path) -> None:
        """Write every commit but the first as a patch."""
        shutil.rmtree(out, ignore_errors=True)
        plain = ["--no-signature", "--zero-commit", "--no-renames", "--quiet"]
        first = self._git("rev-list", "--max-parents=0", "HEAD").strip()
        self._git("format-patch", *plain, f"--output-directory={out.resolve()}", first)

    def _commit(self, message: str) -> None:
        self._git("add", "--all", "--force")
        if not self._git("status", "--porcelain"):
            raise SeriesError(f"{message.splitlines()[0]}: the patch changes nothing")
        self._git("commit", "--quiet", "--no-verify", f"--message={message}")

    def _tidy(self, paths: list[str]) -> None:
        """Sort and wrap as upstream's pre-commit hooks would: edits leave that open."""
        ruff = [sys.executable, "-m", "ruff"]
        fix = ["check", "--fix", "--exit-zero", "--quiet", "--no-cache", *FIRST_PARTY]
        self._run(*ruff, *fix, *paths)
        self._run(*ruff, "format", "--quiet", "--no-cache", *paths)

    def _git(self, *arguments: str) -> str:
        return self._run("git", *arguments)

    def _run(self, *command: str) -> str:
        run = subprocess.run(
            command,
            cwd=self.folder,
            env={**os.environ, "GIT_CONFIG_GLOBAL": os.devnull},
            capture_output=True,
            text=True,
        )
        if run.returncode:
            raise SeriesError(f"{' '.join(command[:4])}: {run.stderr.strip()}")
        return run.stdout


def _setting(key: str) -> str:
    run = subprocess.run(["git", "config", key], capture_output=True, text=True)
    return run.stdout.strip()
