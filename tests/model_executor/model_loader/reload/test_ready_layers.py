# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Small layers are committed together, in little memory."""

import torch

from vllm.model_executor.model_loader.reload.ledger import Ledger
from vllm.model_executor.model_loader.reload.ready_layers import ReadyLayers
from vllm.model_executor.model_loader.reload.recording import FirstLoad
from vllm.model_executor.model_loader.reload.staging import StagedLayer, StagedTensor
from vllm.model_executor.model_loader.reload.types import LayerReloadingInfo


def layer(name: str, nbytes: int) -> StagedLayer:
    meta = torch.empty(nbytes, dtype=torch.uint8, device="meta")
    rest = torch.device("cpu"), FirstLoad(), Ledger([])
    tensor = StagedTensor(name, "weight", meta, *rest)
    info = LayerReloadingInfo(({}, {}), torch.device("cpu"))
    return StagedLayer(name, torch.nn.Module(), info, {"weight": tensor}, {}, [tensor])


def test_small_layers_wait_for_a_share_of_the_largest():
    experts, norm, gate = layer("experts", 1000), layer("norm", 10), layer("gate", 45)
    ready = ReadyLayers([experts, norm, gate])
    ready.add(norm)
    ready.add(norm)
    assert not ready.are_enough
    ready.add(gate)
    assert ready.are_enough
    assert ready.take() == [norm, gate]
    assert not ready.are_enough and ready.take() == []
    ready.add(experts)
    assert ready.are_enough
