# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What each side runs on: upstream's tests, and the base without the fork."""

from pathlib import Path
from zipfile import ZipFile

from overlay.base import BaseWheel
from overlay.source import extract_source


def extract_tests(source: Path, folder: Path) -> Path:
    """Extract the tests and their settings, without the package itself."""
    return extract_source(source, folder, _is_for_tests)


def _is_for_tests(path: str) -> bool:
    return path == "pyproject.toml" or path.startswith("tests/")


def unpack_base(wheel: BaseWheel, folder: Path) -> Path:
    """Unpack a released wheel; on `PYTHONPATH` it comes before what is installed."""
    with ZipFile(wheel.path) as archive:
        archive.extractall(folder)
    return folder
