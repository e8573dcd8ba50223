# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The base's source distribution: its package, its tests and their settings."""

import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from overlay.base import STORE, BaseError

# What upstream's build asks for when pip wants to know the name of what it downloaded;
# torch, which is one of them, is in this environment.
BUILD_TOOLS = (
    "setuptools>=77,<81",
    "setuptools-scm>=8",
    "setuptools-rust",
    "wheel",
    "packaging",
    "jinja2",
    "cmake",
    "ninja",
    "grpcio-tools",
)


def find_source(version: str, store: Path = STORE) -> Path:
    """Return vLLM's source distribution of a version: a kept or a new one.

    Raises:
        BaseError: pip could not download it.
    """
    source = store / f"vllm-{version}.tar.gz"
    if not source.is_file():
        _download(version, store)
    if not source.is_file():
        raise BaseError(f"vllm {version}: pip downloaded no {source.name}")
    return source


def extract_source(
    source: Path, folder: Path, wanted: Callable[[str], bool] = lambda path: True
) -> Path:
    """Extract the files whose path in the source `wanted` accepts.

    Returns:
        The folder, which now holds what upstream's repository has at its top.
    """
    with tarfile.open(source) as archive:
        members = _stripped(archive, wanted)
        archive.extractall(folder, members=members, filter="data")
    return folder


def _stripped(
    archive: tarfile.TarFile, wanted: Callable[[str], bool]
) -> Iterator[tarfile.TarInfo]:
    for member in archive:
        _, _, path = member.name.partition("/")
        if path and wanted(path):
            yield member.replace(name=path, deep=False)


def _download(version: str, store: Path) -> None:
    print(f"downloading the source of vllm {version} into {store.name}/", flush=True)
    with tempfile.TemporaryDirectory() as tools:
        _pip("install", "--target", tools, *BUILD_TOOLS)
        environment = {
            **os.environ,
            "PYTHONPATH": tools,
            "PATH": os.pathsep.join([f"{tools}/bin", os.environ["PATH"]]),
            "VLLM_VERSION_OVERRIDE": version,
            "VLLM_TARGET_DEVICE": "empty",  # nothing is compiled
        }
        source_only = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
        arguments = [*source_only, "--dest", str(store), f"vllm=={version}"]
        _pip("download", *arguments, environment=environment)


def _pip(*arguments: str, environment: dict[str, str] | None = None) -> None:
    command = [sys.executable, "-m", "pip", arguments[0], "--quiet", *arguments[1:]]
    if subprocess.run(command, env=environment).returncode:
        raise BaseError(f"pip {arguments[0]} {arguments[-1]} failed (see above)")
