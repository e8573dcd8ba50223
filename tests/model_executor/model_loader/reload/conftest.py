# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Real models, without an engine, for the tests of the weight sync.

def test_sync(make_model, cold_load, nan_memory):
    model, vllm_config = built = make_model(case, seed=1)
    with built.worker_context():
        initialize_layerwise_reload(model)
        model.load_weights(case.tensors(seed=2))
        finalize_layerwise_reload(model, vllm_config.model_config)
    assert_same(snapshot(model), cold_load(case, seed=2))
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.checkpoints import Case, write_checkpoint
from tests.harness import memory, stand_ins
from tests.harness.kernels import import_kernels
from tests.harness.models import Built, build, single_rank
from tests.harness.snapshot import Snapshot, snapshot
from tests.harness.threads import one_thread

import_kernels(
    "vllm.model_executor.kernels.group_sums",
    "vllm.model_executor.kernels.strided_copy",
    "vllm.model_executor.layers.fused_moe.scale_scan",
)

MakeModel = Callable[..., Built]
ColdLoad = Callable[[Case, int], Snapshot]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Callable[[Case, int], Path]:
    """Give the folder of a case's checkpoint of some seed, written once a session."""
    folders: dict[tuple[Case, int], Path] = {}

    def checkpoint(case: Case, seed: int) -> Path:
        if (case, seed) not in folders:
            folder = tmp_path_factory.mktemp("checkpoint")
            folders[case, seed] = write_checkpoint(case, seed, folder)
        return folders[case, seed]

    return checkpoint


@pytest.fixture(scope="package", autouse=True)
def single_thread() -> Iterator[None]:
    """Compute in one thread, as a session's tests on tiny tensors should.

    They gain nothing from more, and on a busy machine threads wait long for each other.
    """
    with one_thread():
        yield


@pytest.fixture(scope="module")
def rank() -> Iterator[None]:
    """Be the one rank of vLLM's distributed groups, once a module."""
    with single_rank():
        yield


@pytest.fixture
def should_do_global_cleanup_after_test() -> bool:
    """Have upstream's conftest leave `rank` its groups from test to test."""
    return False


@pytest.fixture
def make_model(checkpoint, rank, monkeypatch) -> Iterator[MakeModel]:
    """Give a function of case and seed that builds a fresh model from disk.

    Further arguments are those of `EngineArgs`. Memory that loading leaves unwritten
    reads NaN. The stand-ins for kernels that this CPU lacks stay for the whole test,
    because a reload processes weights again.
    """
    stand_ins.install(monkeypatch)
    dtype = torch.get_default_dtype()

    def make_model(case: Case, seed: int, **arguments) -> Built:
        with memory.nan_memory():
            return build(case, checkpoint(case, seed), **arguments)

    yield make_model
    torch.set_default_dtype(dtype)


@pytest.fixture
def no_packing() -> Iterator[None]:
    """Serve weights as checkpoints hold them; not for tests that use `cold_load`."""
    with stand_ins.no_packing():
        yield


@pytest.fixture(scope="session")
def cold_snapshots() -> dict[tuple[Case, int], Snapshot]:
    """The snapshots that `cold_load` has taken in this session."""
    return {}


@pytest.fixture
def cold_load(make_model, cold_snapshots) -> ColdLoad:
    """Give a function of case and seed: what a fresh model of that checkpoint holds."""

    def cold_load(case: Case, seed: int) -> Snapshot:
        if (case, seed) not in cold_snapshots:
            cold_snapshots[case, seed] = snapshot(make_model(case, seed).model)
        return cold_snapshots[case, seed]

    return cold_load


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """Let memory that nobody wrote read NaN for the whole test."""
    with memory.nan_memory():
        yield
