# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A checkpoint on disk: where each tensor lies, and reading it piece by piece.

    E - experts

Nothing is mapped into memory: what was read of a mapping stays there.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from vllm.model_executor.model_loader.safetensors_header import read_header

__all__ = ["Checkpoint", "StoredTensor", "UnreadableCheckpoint", "open_checkpoint"]

_INDEX = "model.safetensors.index.json"
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "I64": torch.int64,
    "F64": torch.float64,
}
# So small that it stays in the processor's cache until it was looked at.
_CHUNK = 1 << 18


class UnreadableCheckpoint(Exception):
    """A checkpoint, or a part of it, is not there or is not what it should be."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor, or an expert's part of a fused one, in a file.

    Attributes:
        name: its name in the checkpoint.
        file: the file.
        dtype: as safetensors calls it, e.g. "F8_E4M3".
        shape: its shape.
        start: offset in the file, in bytes.
        nbytes: its length.
        expert: which part of a fused tensor it is.

    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int
    expert: int | None = None

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)} in {self.file.name}"

    @property
    def layer(self) -> str:
        """Name of the module that it belongs to."""
        return self.name.rpartition(".")[0]

    @property
    def parameter(self) -> str:
        """Its name in that module."""
        return self.name.rpartition(".")[2]

    @property
    def torch_dtype(self) -> torch.dtype:
        """Its dtype; bytes if torch has none like it."""
        return _DTYPES.get(self.dtype, torch.uint8)

    def of_expert(self, expert: int) -> "StoredTensor":
        """The part [...] of one expert, if this is [E, ...]."""
        nbytes = self.nbytes // self.shape[0]
        start = self.start + expert * nbytes
        shape = self.shape[1:]
        return replace(self, shape=shape, start=start, nbytes=nbytes, expert=expert)

    def chunks(self, size: int = _CHUNK) -> Iterator[bytes]:
        """Its bytes in order, `size` at a time.

        Raises:
            UnreadableCheckpoint: the file ends before the tensor does.
            OSError: the file cannot be read.

        """
        stop = self.start + self.nbytes
        with open(self.file, "rb", buffering=0) as file:
            for offset in range(self.start, stop, size):
                chunk = os.pread(file.fileno(), min(size, stop - offset), offset)
                if len(chunk) < min(size, stop - offset):
                    raise UnreadableCheckpoint(f"{self.file}: ends within {self.name}")
                yield chunk

    def read(self) -> torch.Tensor:
        """Its values; bytes, [nbytes], if torch has no such dtype."""
        if not self.nbytes:
            return torch.empty(self.shape, dtype=self.torch_dtype)
        data = bytearray(b"".join(self.chunks()))
        shape = self.shape if self.dtype in _DTYPES else (-1,)
        return torch.frombuffer(data, dtype=self.torch_dtype).view(shape)


@dataclass(frozen=True)
class Checkpoint:
    """A folder with config.json and safetensors files.

    Attributes:
        folder: the folder.
        config: what config.json holds.
        tensors: every tensor by name.
        listed: file of each tensor, as the index has it; empty without an index.

    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    listed: Mapping[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The part of the config that describes the language model."""
        return self.config.get("text_config") or self.config

    @property
    def quantization(self) -> Mapping[str, Any]:
        """How the config says that weights are quantised; empty if they are not."""
        keys = ("quantization_config", "compression_config")
        places = [
            part.get(key) for part in (self.config, self.text_config) for key in keys
        ]
        return next(filter(None, places), {})


def open_checkpoint(source: str) -> Checkpoint:
    """Read the config and the headers of a checkpoint, but no tensor.

    Args:
        source: a folder, or the id of a model in the local Hugging Face cache.

    Raises:
        UnreadableCheckpoint: there is none, a file that it needs is missing, or one is
            broken.

    """
    folder = _folder(source)
    config = _read_json(folder / "config.json")
    index = folder / _INDEX
    listed = _read_json(index).get("weight_map", {}) if index.exists() else {}
    names = sorted(set(listed.values())) or sorted(
        file.name for file in folder.glob("*.safetensors")
    )
    if not names:
        raise UnreadableCheckpoint(f"{folder}: expected *.safetensors, found none")
    if missing := [name for name in names if not (folder / name).exists()]:
        raise UnreadableCheckpoint(
            f"{folder}: {_INDEX} lists {len(missing)} files that are not there: "
            f"{', '.join(missing[:3])}; fetch them again"
        )
    tensors = {t.name: t for name in names for t in _read_header(folder / name)}
    return Checkpoint(folder, config, tensors, listed)


def _folder(source: str) -> Path:
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(huggingface_hub.snapshot_download(source, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise UnreadableCheckpoint(
            f"{source}: neither a folder nor a model in the local Hugging Face cache"
        ) from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UnreadableCheckpoint(f"{file}: {error}") from error
    if not isinstance(content, dict):
        raise UnreadableCheckpoint(f"{file}: expected a JSON object")
    return content


def _read_header(file: Path) -> Iterator[StoredTensor]:
    try:
        with safe_open(file, framework="pt"):
            pass  # looks at the header, and at the length of the file
    except (OSError, SafetensorError) as error:
        raise UnreadableCheckpoint(f"{file}: {error}; fetch it again") from error
    with open(file, "rb") as stream:
        for name, dtype, shape, start, nbytes in read_header(stream):
            yield StoredTensor(name, file, dtype, shape, start, nbytes)
