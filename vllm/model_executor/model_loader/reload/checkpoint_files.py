# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The files of a checkpoint, mapped: what nobody touches of a tensor is not read.

A file that is written to while it is mapped gives values of two checkpoints, and one
that is cut short ends the process that touches what is gone. So a file is compared with
what was opened before a tensor of it is used, and in the end. That leaves a moment in
between: whoever publishes a checkpoint should write new files and rename them.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open

from vllm.model_executor.model_loader.mapped_safetensors import tensor_on
from vllm.model_executor.model_loader.safetensors_header import HeaderEntry, read_header

from . import mapped_pages
from .errors import WeightSyncError

__all__ = ["ByteRange", "CheckpointFile", "StoredTensor"]

ByteRange = tuple[int, int]
# Linux reads ahead no more at once than a device takes in one request.
_BLOCK_BYTES = 1 << 20


class CheckpointFile:
    """A safetensors file that is open.

        with CheckpointFile(path) as file:
            for stored in file.tensors:
                start, stop = stored.start, stored.start + stored.nbytes
                file.read_ahead(start, stop)    # asks for it
                file.fault_in(start, stop)      # waits for it
                tensor = file.map(stored)
                file.release(start, stop)       # when it was used

    Args:
        path: where it is.

    Attributes:
        tensors: what it holds, in the order of the bytes.

    Raises:
        WeightSyncError: it is no whole safetensors file.

    """

    def __init__(self, path: str):
        self.path = path
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        try:
            self._opened = _identity(os.fstat(self._file.fileno()))
            entries = self._entries()
            self._dtypes = _dtypes(path, entries)
            self._pages = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (SafetensorError, ValueError) as error:
            self._file.close()
            raise WeightSyncError(
                f"{path} is no whole safetensors file: {error}; write it again"
            ) from error
        except BaseException:
            self._file.close()
            raise
        self.tensors = [StoredTensor(self, entry) for entry in entries]

    def _entries(self) -> list[HeaderEntry]:
        """Where each tensor is, in the order of the bytes."""
        size = os.fstat(self._file.fileno()).st_size
        entries = sorted(read_header(self._file), key=lambda entry: entry.start)
        for entry in entries:
            stop = entry.start + entry.nbytes
            if stop > size:
                raise WeightSyncError(
                    f"{self.path} was cut short: {entry.name} ends at byte {stop}, "
                    f"the file at {size}; write it again"
                )
        return entries

    def map(self, stored: StoredTensor) -> torch.Tensor:
        """A tensor on the file's pages."""
        entry = stored.entry
        dtype = self._dtypes[entry.dtype]
        if entry.nbytes == 0:
            return torch.empty(entry.shape, dtype=dtype, device="cpu")
        return tensor_on(self._pages, entry, dtype)

    def read_ahead(self, start: int, stop: int) -> None:
        """Ask the system to read bytes of the file, and do not wait for them."""
        if not hasattr(os, "posix_fadvise"):
            return
        for block in range(start, stop, _BLOCK_BYTES):
            size = min(_BLOCK_BYTES, stop - block)
            os.posix_fadvise(self._file.fileno(), block, size, os.POSIX_FADV_WILLNEED)

    def fault_in(self, start: int, stop: int) -> None:
        """Wait until bytes of the file are in memory, and mapped.

        Raises:
            WeightSyncError: they cannot be read.

        """
        try:
            mapped_pages.fault_in(self._pages, start, stop)
        except OSError as error:
            raise WeightSyncError(
                f"the system cannot read bytes {start} to {stop} of {self.path}: it "
                "was cut short meanwhile, or the disk fails; sync again from files "
                "that nobody writes to"
            ) from error

    def release(self, start: int, stop: int) -> None:
        """Let go the memory of bytes that are not needed any more."""
        mapped_pages.release(self._pages, start, stop)

    def check_unchanged(self, stored: StoredTensor) -> None:
        """Check that the path still leads to the file that was opened.

        Raises:
            WeightSyncError: it does not, or the file was written to.

        """
        try:
            found = _identity(os.stat(self.path))
        except FileNotFoundError:
            found = None
        if found != self._opened:
            raise WeightSyncError(
                f"{self.path} was {'changed' if found else 'removed'} while "
                f"{stored.name} was read from it; sync again from files that nobody "
                "writes to"
            )

    def __enter__(self) -> CheckpointFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        # Tensors know their file: only a collection would free the mapping.
        self.tensors = []
        del self._pages


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        file: the file.
        entry: what its header says of it.

    """

    file: CheckpointFile
    entry: HeaderEntry

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def start(self) -> int:
        """Its first byte in the file."""
        return self.entry.start

    @property
    def nbytes(self) -> int:
        return self.entry.nbytes


def _dtypes(path: str, entries: Iterable[HeaderEntry]) -> dict[str, torch.dtype]:
    """What the library makes of the header's names of types; it checks the header."""
    names = {entry.dtype: entry.name for entry in entries}
    with safe_open(path, framework="pt") as opened:
        return {dtype: opened.get_tensor(name).dtype for dtype, name in names.items()}


def _identity(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
