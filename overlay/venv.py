# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A complete working environment from nothing but a Python with pip.

Standard library only. What needs more runs in the environment once it exists.
"""

import hashlib
import subprocess
import time
import tomllib
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from overlay.base import ROOT, BaseError, BaseWheel, find_wheel
from overlay.dist_info import fork_metadata, requirements


def make_venv(version: str | None = None) -> Path:
    """Make, or bring up to date, the environment of one base and return its folder.

    Args:
        version: Public version of the base. The default base gets `.venv`, any other
            one `.venv-<version>`.

    Raises:
        BaseError: The base cannot be found, or pip cannot install a requirement.
    """
    wheel = find_wheel(version)
    folder = _folder_of(wheel)
    if not (folder / "bin" / "python").exists():
        with _step(f"{folder.name}: creating"):
            venv.create(folder, with_pip=True)
    _install_requirements(folder, wheel)
    _run(folder, "-m", "overlay", "develop", "--venv", str(folder), *_base(version))
    return folder


def _folder_of(wheel: BaseWheel) -> Path:
    base = wheel.base
    is_default = base.version == base.target.default_version
    return ROOT / (".venv" if is_default else f".venv-{base.version}")


def _base(version: str | None) -> list[str]:
    return ["--base", version] if version else []


def _install_requirements(folder: Path, wheel: BaseWheel) -> None:
    base = wheel.base
    wanted = requirements(fork_metadata(wheel.metadata, base))
    steps = {
        # First and alone, so that nothing else chooses another build of it.
        "torch": [line for line in wanted if line in base.target.pinned],
        f"requirements of {base}": wanted,
        "tools": _development_tools(),
    }
    stamp = folder / "requirements.sha256"
    digest = hashlib.sha256(repr(steps).encode()).hexdigest()
    if stamp.is_file() and stamp.read_text() == digest:
        return
    for title, lines in steps.items():
        if lines:
            with _step(f"{folder.name}: installing {title}"):
                _run(folder, "-m", "pip", "install", "--quiet", *lines)
    stamp.write_text(digest)


def _development_tools() -> list[str]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return settings["dependency-groups"]["dev"]


def _run(folder: Path, *arguments: str) -> None:
    python = folder / "bin" / "python"
    if subprocess.run([str(python), *arguments], cwd=ROOT).returncode:
        raise BaseError(f"{folder.name}: python {' '.join(arguments[:3])} failed")


@contextmanager
def _step(title: str) -> Iterator[None]:
    print(f"{title} ...", flush=True)
    start = time.monotonic()
    yield
    print(f"{title}: {time.monotonic() - start:.0f} s", flush=True)
