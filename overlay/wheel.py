# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Writing the fork's wheel from the base's, member by member.

The same base and the same checkout give the same bytes.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

from overlay.base import BaseWheel
from overlay.dist_info import (
    Row,
    fork_metadata,
    hash_field,
    record_file,
    row_of,
    wheel_file,
)
from overlay.fork import Fork

CHUNK = 1 << 20  # bytes
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date that a zip can hold
READABLE = 0o100644


def build_wheel(wheel: BaseWheel, fork: Fork, out: Path) -> Path:
    """Write the fork's wheel into a folder and return its path.

    Raises:
        EditError: An edit does not fit the base; no wheel is left behind.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"vllm-{fork.base.fork_version}-{wheel.tag}.whl"
    unfinished = path.with_suffix(".part")
    try:
        with ZipFile(wheel.path) as base, WheelWriter(unfinished) as writer:
            _write(base, writer, wheel, fork)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


class WheelWriter:
    """A wheel being written, and the RECORD of what is in it."""

    def __init__(self, path: Path) -> None:
        self._archive = ZipFile(path, "w", ZIP_DEFLATED)
        self.rows: list[Row] = []

    def __enter__(self) -> "WheelWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._archive.close()

    def add(self, name: str, data: bytes) -> None:
        """Write a member."""
        self._archive.writestr(_member(name, READABLE), data)
        self.rows.append(row_of(name, data))

    def copy(self, archive: ZipFile, info: ZipInfo, name: str) -> None:
        """Copy a member of another archive, under a name, a chunk at a time."""
        member = _member(name, info.external_attr >> 16)
        member.file_size = info.file_size
        digest = hashlib.sha256()
        with archive.open(info) as source, self._archive.open(member, "w") as sink:
            while chunk := source.read(CHUNK):
                digest.update(chunk)
                sink.write(chunk)
        self.rows.append(Row(name, hash_field(digest.digest()), str(info.file_size)))

    def seal(self, dist_info: str) -> None:
        """Write RECORD, the last member."""
        record = record_file([*self.rows, Row(f"{dist_info}/RECORD")])
        self._archive.writestr(_member(f"{dist_info}/RECORD", READABLE), record)


def _write(base: ZipFile, writer: WheelWriter, wheel: BaseWheel, fork: Fork) -> None:
    dist_info = f"vllm-{fork.base.fork_version}.dist-info"
    changed = dict(_changed(base, wheel, fork))
    for info, name in _kept(base, wheel, fork):
        if name not in changed:
            writer.copy(base, info, name)
    for name, data in sorted(changed.items()):
        writer.add(name, data)
    writer.seal(dist_info)


def _kept(base: ZipFile, wheel: BaseWheel, fork: Fork) -> Iterator[tuple[ZipInfo, str]]:
    """Yield the base's files, with the names that they have in the fork."""
    old = f"{wheel.project}-{wheel.version}."
    new = f"vllm-{fork.base.fork_version}."
    for info in base.infolist():
        if info.is_dir() or info.filename == f"{old}dist-info/RECORD":
            continue
        renamed = info.filename.startswith(old)
        yield info, new + info.filename[len(old) :] if renamed else info.filename


def _changed(
    base: ZipFile, wheel: BaseWheel, fork: Fork
) -> Iterator[tuple[str, bytes]]:
    """Yield what the fork adds or replaces: names and contents."""
    members = set(base.namelist())
    dist_info = f"vllm-{fork.base.fork_version}.dist-info"

    def read_base(path: str) -> str | None:
        return base.read(path).decode() if path in members else None

    for path, text in fork.generated(read_base).items():
        yield path, text.encode()
    for path, file in fork.overlay.items():
        yield path, file.read_bytes()
    yield f"{dist_info}/METADATA", fork_metadata(wheel.metadata, fork.base).encode()
    yield f"{dist_info}/WHEEL", wheel_file(wheel.tag).encode()


def _member(name: str, mode: int) -> ZipInfo:
    member = ZipInfo(name, EPOCH)
    member.compress_type = ZIP_DEFLATED
    member.create_system = 3  # Unix, whichever machine builds
    member.external_attr = mode << 16
    return member
