# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Where upstream's tests and the base's files come from."""

import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

from overlay.base import STORE, BaseError, BaseWheel

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


def extract_tests(source: Path, folder: Path) -> Path:
    """Extract the tests and their settings, without the package itself."""
    with tarfile.open(source) as archive:
        archive.extractall(folder, members=_tests_in(archive), filter="data")
    return folder


def _tests_in(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in archive:
        _, _, path = member.name.partition("/")
        if path == "pyproject.toml" or path.startswith("tests/"):
            yield member.replace(name=path, deep=False)


def unpack_base(wheel: BaseWheel, folder: Path) -> Path:
    """Unpack a released wheel; on `PYTHONPATH` it comes before what is installed."""
    with ZipFile(wheel.path) as archive:
        archive.extractall(folder)
    return folder
