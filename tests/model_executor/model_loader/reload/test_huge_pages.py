# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Large staged tensors are backed by large pages where the system has them."""

from pathlib import Path

import pytest
import torch

from vllm.model_executor.model_loader.reload.huge_pages import prefer_huge_pages

KERNEL = Path("/sys/kernel/mm/transparent_hugepage")


def flags_at(address: int) -> list[str]:
    """The kernel's flags of the mapping that holds an address of this process."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, _, rest = line.partition(" ")
        if "-" in key and not key.endswith(":"):
            start, stop = (int(part, 16) for part in key.split("-"))
            inside = start <= address < stop
        elif inside and key == "VmFlags:":
            return rest.split()
    raise AssertionError(f"nothing is mapped at {address:#x}")


@pytest.mark.skipif(not KERNEL.exists(), reason="this kernel has no large pages")
def test_a_large_tensor_prefers_them():
    tensor = torch.empty(64 << 20, dtype=torch.uint8)
    middle = tensor.data_ptr() + tensor.nbytes // 2
    assert "hg" not in flags_at(middle)
    prefer_huge_pages(tensor)
    assert "hg" in flags_at(middle)


@pytest.mark.parametrize("shape", [(), (0,), (1 << 20,)])
def test_a_small_tensor_is_left_alone(shape):
    tensor = torch.ones(shape, dtype=torch.uint8)
    prefer_huge_pages(tensor)
    assert torch.equal(tensor, torch.ones(shape, dtype=torch.uint8))
