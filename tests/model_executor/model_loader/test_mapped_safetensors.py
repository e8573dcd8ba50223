# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Tensors on a file's pages are those that the library makes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vllm.model_executor.model_loader import weight_utils
from vllm.model_executor.model_loader.mapped_safetensors import MappedSafetensors

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e8m0fnu,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
]
# Two values a byte: no scalar.
PACKED = [torch.float4_e2m1fn_x2]


def tensor_of(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Random bytes of a type, of which a bool has only two."""
    size = (*shape[:-1], shape[-1] * dtype.itemsize) if shape else (dtype.itemsize,)
    values = torch.randint(0, 2 if dtype == torch.bool else 256, size)
    return values.to(torch.uint8).view(dtype).view(shape)


@pytest.fixture
def path(tmp_path) -> Path:
    """Give a file with matrices, scalars and nothing of each type."""
    torch.manual_seed(0)
    tensors = {"odd": torch.arange(3, dtype=torch.uint8)}
    for dtype in DTYPES + PACKED:
        for place, shape in enumerate([(4, 6), (3, 2, 2), (0, 4), ()]):
            if shape or dtype not in PACKED:
                tensors[f"{dtype}.{place}"] = tensor_of(dtype, *shape)
    save_file(tensors, tmp_path / "of all.safetensors", metadata={"format": "pt"})
    return tmp_path / "of all.safetensors"


def test_tensors_are_those_of_the_library(path):
    with (
        safe_open(path, framework="pt") as expected,
        MappedSafetensors(path, framework="pt") as file,
    ):
        assert list(file.keys()) == list(expected.keys())
        assert file.metadata() == expected.metadata()
        for name in expected.keys():  # noqa: SIM118
            one, other = file.get_tensor(name), expected.get_tensor(name)
            assert (one.dtype, one.shape) == (other.dtype, other.shape), name
            assert one.is_cpu and one.is_contiguous(), name
            ours, theirs = (t.reshape(-1).view(torch.uint8) for t in (one, other))
            assert torch.equal(ours, theirs), name


class Counted:
    """The library's, on a CPU all the same, and which tensors it was asked for."""

    def __init__(self, path, framework, device):
        self.library = safe_open(path, framework=framework)
        self.device = device
        self.asked: list[str] = []

    def keys(self):
        return self.library.keys()

    def get_tensor(self, name):
        self.asked.append(name)
        return self.library.get_tensor(name)


@pytest.mark.parametrize("device", ["cpu", "cuda:0", 0])
def test_of_each_type_for_the_cpu_the_library_makes_one(device, path, monkeypatch):
    module = "vllm.model_executor.model_loader.mapped_safetensors.safe_open"
    monkeypatch.setattr(module, Counted)
    file = MappedSafetensors(path, "pt", device)
    filled = [name for name in file.keys() if file.get_tensor(name).numel()]  # noqa: SIM118
    library: Any = file._library
    assert library.device == device
    count = len([name for name in library.asked if name in filled])
    assert count == (len(DTYPES + PACKED) if device == "cpu" else len(filled))
    assert len(DTYPES + PACKED) < len(filled)


def test_default_device_and_modes_do_not_matter(path):
    with torch.device("meta"), MappedSafetensors(path) as file:
        assert all(file.get_tensor(name).is_cpu for name in file.keys())  # noqa: SIM118


def test_a_tensor_outlives_the_file_and_is_private(path):
    before = path.read_bytes()
    with MappedSafetensors(path) as file:
        tensors = [file.get_tensor(f"{torch.float32}.{place}") for place in (0, 1)]
    kept = tensors[1].clone()
    tensors[1].add_(1)
    path.rename(path.with_name("renamed"))
    assert torch.equal(tensors[1], kept + 1)
    assert path.with_name("renamed").read_bytes() == before


def test_what_is_wrong_is_an_error_of_the_library(path):
    file = MappedSafetensors(path)
    with pytest.raises(SafetensorError, match="no such"):
        file.get_tensor("no such")
    with file:
        for name in file.keys():  # noqa: SIM118
            file.get_tensor(name)
    with pytest.raises(SafetensorError, match="closed"):
        file.get_tensor(name)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SafetensorError):
        MappedSafetensors(path)
    with pytest.raises(FileNotFoundError):
        MappedSafetensors(path.with_name("nothing"))


def test_a_cold_load_reads_so(path):
    assert weight_utils.safe_open is MappedSafetensors
    weights = dict(weight_utils.safetensors_weights_iterator([str(path)], False))
    with safe_open(path, framework="pt") as expected:
        assert weights.keys() == set(expected.keys())
        name = f"{torch.bfloat16}.1"
        ours, theirs = weights[name], expected.get_tensor(name)
    assert torch.equal(ours.view(torch.int16), theirs.view(torch.int16))
