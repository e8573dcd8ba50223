# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The backend for shared memory, made as a worker makes it, with a stand-in model."""

from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import pytest
import torch
from torch import nn

from tests.harness.packed import bucket_of_a_trainer
from tests.harness.transfer_engine import make_transfer_engine
from vllm.config import VllmConfig

Named = list[tuple[str, torch.Tensor]]


class Model(nn.Module):
    """Keeps copies of what is loaded."""

    def __init__(self):
        super().__init__()
        self.loaded: Named = []

    def load_weights(self, weights: Named) -> None:
        self.loaded += [(name, tensor.clone()) for name, tensor in weights]


@pytest.fixture
def segment() -> Iterator[SharedMemory]:
    with bucket_of_a_trainer(4096) as segment:
        yield segment


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def engine(model):
    device = torch.device("cpu")
    return make_transfer_engine("shm", device, model, VllmConfig())


def chunk(bucket: SharedMemory, **changed: Any) -> dict[str, Any]:
    info = {
        "segment": bucket.name,
        "names": ["scale"],
        "dtype_names": ["float32"],
        "shapes": [[2]],
        "offsets": [8],
    }
    return {**info, **changed}


def init(engine, **info: Any) -> None:
    engine.init_transfer_engine(engine.parse_init_info(info))


def update(engine, info: Any) -> None:
    engine.receive_weights(engine.parse_update_info(info))


def write(segment: SharedMemory, values: list[float]) -> None:
    assert segment.buf is not None
    segment.buf[8:16] = torch.tensor(values).numpy().tobytes()


def test_chunks_come_through_one_bucket(engine, model, segment):
    init(engine, segment=segment.name)
    for values in ([1.0, 2.0], [3.0, 4.0]):
        write(segment, values)
        update(engine, chunk(segment))
    assert [(name, tensor.tolist()) for name, tensor in model.loaded] == [
        ("scale", [1.0, 2.0]),
        ("scale", [3.0, 4.0]),
    ]


def test_a_worker_may_say_what_to_load_with(engine, model, segment):
    init(engine, segment=segment.name)
    write(segment, [1.0, 2.0])
    loaded: Named = []
    engine.receive_weights(engine.parse_update_info(chunk(segment)), loaded.extend)
    assert [name for name, _ in loaded] == ["scale"]
    assert model.loaded == []


def test_an_update_before_init_is_refused(engine, segment):
    with pytest.raises(ValueError, match="expected segment None"):
        update(engine, chunk(segment))


def test_an_update_from_another_bucket_is_refused(engine, model, segment):
    init(engine, segment=segment.name)
    with pytest.raises(ValueError, match="got 'vllm-weights-other'"):
        update(engine, chunk(segment, segment="vllm-weights-other"))
    assert model.loaded == []


def test_an_update_after_shutdown_is_refused(engine, segment):
    init(engine, segment=segment.name)
    engine.shutdown()
    with pytest.raises(ValueError, match="expected segment None"):
        update(engine, chunk(segment))


def test_a_chunk_that_cannot_be_is_refused_as_a_whole(engine, model, segment):
    init(engine, segment=segment.name)
    with pytest.raises(ValueError, match="bucket of 4096 bytes"):
        update(engine, chunk(segment, offsets=[4096]))
    assert model.loaded == []


@pytest.mark.parametrize(
    "info", [{}, {"segment": "x", "pickled": ""}, {"path": "/"}], ids=str
)
def test_what_no_one_knows_is_refused(engine, info):
    with pytest.raises(ValueError, match="Invalid"):
        init(engine, **info)
    with pytest.raises(ValueError, match="Invalid"):
        update(engine, info)
