# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Tensors on the pages of a safetensors file, made in a quarter of the library's time.

The library makes each one of a storage that Python cuts out of another, which takes
longer than to load a small one. A mixture of experts has tens of thousands of them.
"""

from __future__ import annotations

import mmap
import os
from functools import cached_property
from typing import Any

import torch
from safetensors import safe_open

from .safetensors_header import HeaderEntry, read_header

__all__ = ["MappedSafetensors", "tensor_on"]


def tensor_on(pages: mmap.mmap, entry: HeaderEntry, dtype: torch.dtype) -> torch.Tensor:
    """A tensor on a file's pages, of at least one byte.

    Args:
        pages: the file. It stays mapped as long as the tensor is there, and what is
            written to the tensor is written to private copies of its pages.
        entry: what the file's header says of the tensor.
        dtype: what torch calls its type.

    """
    count = entry.nbytes // dtype.itemsize
    # Under a default device these cost more than a copy.
    with torch._C.DisableTorchFunction():
        flat = torch.frombuffer(pages, dtype=dtype, count=count, offset=entry.start)
        # Of types that torch packs, the last dimension is shorter than stored.
        return flat.view(*entry.shape[:-1], -1) if entry.shape else flat.view(())


class MappedSafetensors:
    """A safetensors file that is open; stands for the library's `safe_open`.

        with MappedSafetensors(path, framework="pt") as file:
            for name in file.keys():
                tensor = file.get_tensor(name)

    All but the tensors is the library's: it checks the header, and says what torch
    calls each type.

    Args:
        path: where it is.
        framework: "pt".
        device: where the tensors shall be; the library makes those that are not for
            the CPU.

    Raises:
        SafetensorError: it is no whole safetensors file.
        FileNotFoundError: it is not there.

    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        framework: str = "pt",
        device: str | int = "cpu",
    ):
        self._path = path
        self._library = safe_open(path, framework=framework, device=device)
        self._dtypes: dict[str, torch.dtype] = {}
        if device != "cpu":
            self._entries = {}

    def keys(self) -> list[str]:
        """Names of the tensors."""
        return self._library.keys()

    def metadata(self) -> dict[str, str]:
        """What else was written to the header."""
        return self._library.metadata()

    def get_tensor(self, name: str) -> torch.Tensor:
        """Return a tensor; of one on the CPU nothing was read.

        Raises:
            SafetensorError: there is none of this name.

        """
        entry = self._entries.get(name)
        if entry is None or not entry.nbytes:
            return self._library.get_tensor(name)
        dtype = self._dtypes.get(entry.dtype)
        if dtype is None:
            tensor = self._library.get_tensor(name)
            self._dtypes[entry.dtype] = tensor.dtype
            return tensor
        return tensor_on(self._pages, entry, dtype)

    @cached_property
    def _entries(self) -> dict[str, HeaderEntry]:
        with open(self._path, "rb") as file:
            return {entry.name: entry for entry in read_header(file)}

    @cached_property
    def _pages(self) -> mmap.mmap:
        with open(self._path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def __enter__(self) -> MappedSafetensors:
        self._library.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._library.__exit__(*error)
        self._entries = {}  # to ask for a tensor is the library's error from now on
        vars(self).pop("_pages", None)
