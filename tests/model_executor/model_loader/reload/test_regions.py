# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Boxes are told in the words of those who train."""

import pytest
import torch

from vllm.model_executor.model_loader.reload.ledger import Box
from vllm.model_executor.model_loader.reload.regions import describe


@pytest.mark.parametrize(
    "name, start, stop, expert, shard, where",
    [
        ("w13_weight", (1, 0, 0), (2, 4, 6), 1, "gate", ""),
        ("w13_weight", (1, 4, 0), (2, 8, 6), 1, "up", ""),
        ("w13_weight", (1, 5, 0), (2, 8, 6), 1, "up", " at [5:8, 0:6]"),
        ("w2_weight", (2, 0, 0), (3, 8, 6), 2, "down", ""),
        ("weight", (0, 0, 0), (1, 8, 6), None, None, " at [0:1, 0:8, 0:6]"),
    ],
)
def test_words(name, start, stop, expert, shard, where):
    tensor = torch.empty(3, 8, 6, device="meta")
    finding = describe("layer", name, tensor, Box(start, stop), "never sent")
    assert (finding.expert, finding.shard) == (expert, shard)
    assert finding.detail == f"never sent{where}"
