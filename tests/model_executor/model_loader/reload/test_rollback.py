# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A sync that fails after its first commits leaves the weights as they were."""

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from tests.checkpoints import CASES, Case
from tests.harness.memory import allocated
from tests.harness.models import Built
from tests.harness.snapshot import Snapshot, assert_same, snapshot
from vllm.model_executor.model_loader.reload import (
    ReloadStatus,
    WeightSyncError,
    abort_layerwise_reload,
    committer,
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    mark_inconsistent,
    reload_status,
)
from vllm.model_executor.model_loader.reload.commit import Commit, apply_commits
from vllm.model_executor.model_loader.reload.registry import get_layerwise_info
from vllm.model_executor.model_loader.reload.rollback import Rollback

# By case a tensor whose layer is incomplete without it.
OWED = {
    "qwen3_moe-bf16": "model.layers.1.mlp.experts.7.down_proj.weight",
    "qwen3_moe-fp8_block": "model.layers.1.mlp.experts.7.down_proj.weight_scale_inv",
    "qwen3_moe-fp8_block-fp8_kv": (
        "model.layers.1.mlp.experts.7.down_proj.weight_scale_inv"
    ),
    "qwen3_moe-fp8_tensor_static": (
        "model.layers.1.mlp.experts.7.down_proj.weight_scale"
    ),
    "deepseek_v3-fp8_block": "model.layers.1.mlp.experts.7.up_proj.weight_scale_inv",
    "gpt_oss-bf16": "model.layers.1.mlp.experts.gate_up_proj_bias",
    "llama-bf16": "model.layers.1.self_attn.k_proj.weight",
}
CASE = CASES["qwen3_moe-fp8_block-fp8_kv"]
Tensors = dict[str, torch.Tensor]


class Server:
    """A model that serves seed 1, and syncs seed 2.

    Attributes:
        owed: a tensor whose layer is incomplete without it.

    """

    def __init__(self, built: Built, case: Case, owed: str):
        self.built = built
        self.new: Tensors = dict(case.tensors(2))
        self.owed = owed

    def serving(self) -> Snapshot:
        """What serves, without the sync that is open."""
        values = snapshot(self.built.model).items()
        return {p: value for p, value in values if not p.startswith("load_weights.")}

    def addresses(self) -> dict[str, int]:
        params = self.built.model.named_parameters(remove_duplicate=False)
        return {name: param.data_ptr() for name, param in params}

    def start(self) -> None:
        with self.built.worker_context():
            initialize_layerwise_reload(self.built.model)

    def load(self, tensors) -> None:
        """Load tensors that complete some layers: nobody is served then."""
        with self.built.worker_context():
            self.built.model.load_weights(tensors)
        status = reload_status(self.built.model)
        assert status.fenced or status.state == "inconsistent"

    def finish(self) -> None:
        with self.built.worker_context():
            finalize_layerwise_reload(
                self.built.model, self.built.vllm_config.model_config
            )

    def sync(self, tensors: Tensors) -> None:
        self.start()
        self.load(tensors.items())
        self.finish()


def lose(server: Server) -> None:
    with pytest.raises(WeightSyncError, match="never sent"):
        server.sync({n: t for n, t in server.new.items() if n != server.owed})


def send_nan(server: Server) -> None:
    nan = torch.full_like(server.new[server.owed], float("nan"))
    with pytest.raises(WeightSyncError, match="scale is nan"):
        server.sync(server.new | {server.owed: nan})


def die(server: Server) -> None:
    def dies() -> Iterator[tuple[str, torch.Tensor]]:
        yield from server.new.items()
        raise gone

    gone = ConnectionResetError("the trainer went away")
    server.start()
    with pytest.raises(ConnectionResetError) as error:
        server.load(dies())
    assert error.value is gone
    assert reload_status(server.built.model).state == "serving"
    with pytest.raises(WeightSyncError, match="was aborted"):
        server.finish()


def change_what_is_committed(server: Server) -> None:
    norm = "model.layers.0.input_layernorm.weight"
    server.start()
    server.load(server.new.items())
    with pytest.raises(WeightSyncError, match="came again with other"):
        server.built.model.load_weights([(norm, server.new[norm] + 1)])


def abort(server: Server) -> None:
    server.start()
    server.load(server.new.items())
    abort_layerwise_reload(server.built.model, "the user gave up")


def start_another(server: Server) -> None:
    server.start()
    server.load(server.new.items())
    server.start()


def fail_to_commit(server: Server) -> None:
    """Break off when a layer has been overwritten already."""

    def fails(commits: Sequence[Commit]) -> None:
        apply_commits(commits)
        if any(c.layer == "model.layers.0.input_layernorm" for c in commits):
            raise RuntimeError("the device is gone")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(committer, "apply_commits", fails)
        with pytest.raises(WeightSyncError, match="the device is gone"):
            server.sync(server.new)


FAULTS: list[Callable[[Server], None]] = [
    lose,
    send_nan,
    die,
    change_what_is_committed,
    abort,
    start_another,
    fail_to_commit,
]


@pytest.fixture(autouse=True)
def per_layer(monkeypatch) -> None:
    monkeypatch.setenv("VLLM_RELOAD_COMMIT", "layer")
    monkeypatch.setenv("VLLM_RELOAD_ROLLBACK", "host")


@pytest.fixture
def make_server(make_model, nan_memory) -> Callable[[str], Server]:
    return lambda name: Server(make_model(CASES[name], 1), CASES[name], OWED[name])


@pytest.fixture
def server(make_server) -> Server:
    return make_server("qwen3_moe-fp8_block-fp8_kv")


@pytest.fixture
def rollback(monkeypatch) -> Rollback:
    """The rollback of the next sync."""
    rollback = Rollback()
    monkeypatch.setattr(Rollback, "from_environment", lambda: rollback)
    return rollback


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("name", OWED)
def test_the_old_weights_serve_on(name, fault, make_server, cold_load):
    if fault is send_nan and "scale" not in OWED[name]:
        pytest.skip("nothing tells a NaN among bf16 weights")
    server = make_server(name)
    before, addresses = server.serving(), server.addresses()
    fault(server)
    status = reload_status(server.built.model)
    assert (status.version, status.detail, status.fenced) == (0, "", False)
    assert status.state == ("updating" if fault is start_another else "serving")
    if fault is not start_another:  # which shows itself in the snapshot
        assert_same(server.serving(), before)
    assert server.addresses() == addresses
    server.sync(server.new)
    assert_same(server.serving(), cold_load(CASES[name], 2))
    assert reload_status(server.built.model) == ReloadStatus("serving", 1)


def test_without_it_the_model_is_fenced(server, monkeypatch):
    monkeypatch.setenv("VLLM_RELOAD_ROLLBACK", "off")
    lose(server)
    status = reload_status(server.built.model)
    assert status.state == "inconsistent" and status.fenced


def test_an_unknown_kind_is_refused(server, monkeypatch):
    monkeypatch.setenv("VLLM_RELOAD_ROLLBACK", "disk")
    with pytest.raises(ValueError, match="must be 'off' or 'host', but is 'disk'"):
        server.start()
    assert reload_status(server.built.model).state == "serving"


def test_a_second_sync_rolls_back_to_the_first(server, cold_load):
    server.sync(server.new)
    server.new = dict(CASE.tensors(3))
    lose(server)
    assert_same(server.serving(), cold_load(CASE, 2))
    assert reload_status(server.built.model) == ReloadStatus("serving", 1)


def test_weights_that_were_lost_before_stay_lost(server):
    mark_inconsistent(server.built.model, "a test", fenced=False)
    before = server.serving()
    lose(server)
    assert_same(server.serving(), before)
    expected = ReloadStatus("inconsistent", 0, "a test", fenced=False)
    assert reload_status(server.built.model) == expected


def test_what_the_model_derives_is_derived_again(server, monkeypatch):
    model = server.built.model

    def derive() -> None:
        model.derived = model.model.norm.weight[0].item()
        if model.derived != old:
            raise RuntimeError("not with these weights")

    old = model.model.norm.weight[0].item()
    hook = "process_weights_after_loading"
    monkeypatch.setattr(model, hook, derive, raising=False)
    derive()
    before = server.serving()
    with pytest.raises(RuntimeError, match="not with these weights"):
        server.sync(server.new)
    assert_same(server.serving(), before)
    assert reload_status(model) == ReloadStatus("serving", 0)


def test_a_failed_rollback_fences_the_model(server, rollback, monkeypatch, cold_load):
    def fails() -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(rollback, "restore", fails)
    lose(server)
    status = reload_status(server.built.model)
    assert status.state == "inconsistent" and status.fenced
    assert "never sent" in status.detail
    assert status.detail.endswith("RuntimeError('the device is gone')")
    assert rollback.nbytes == 0
    server.sync(server.new)
    assert_same(server.serving(), cold_load(CASE, 2))


def test_it_takes_the_bytes_of_the_committed_layers(no_packing, make_server, rollback):
    server = make_server("llama-bf16")
    server.start()
    assert rollback.nbytes == 0
    server.load(server.new.items())
    committed = [
        layer
        for layer in server.built.model.modules()
        if get_layerwise_info(layer).staged is None
    ]
    params = {p for layer in committed for p in layer.parameters(recurse=False)}
    sizes = {param.data_ptr(): param.nbytes for param in params}
    assert rollback.nbytes == sum(sizes.values()) > 0
    server.finish()
    assert rollback.nbytes == 0


def test_nothing_is_kept_by_a_sync_that_commits_at_the_end(server, monkeypatch):
    monkeypatch.setenv("VLLM_RELOAD_COMMIT", "model")
    monkeypatch.setattr(Rollback, "keep", lambda *_: pytest.fail("kept a copy"))
    server.start()
    server.built.model.load_weights(server.new.items())
    server.finish()


@pytest.mark.parametrize("fault", [Server.sync, die], ids=["finished", "failed"])
def test_it_is_freed_when_the_sync_is_over(fault, make_server, rollback):
    server = make_server("llama-bf16")
    total = sum(param.nbytes for param in server.built.model.parameters())
    with allocated() as count:
        fault(server, *[server.new] * (fault is not die))
        assert rollback.nbytes == 0
    assert count.peak > total
    assert count.left <= 0.05 * total


def test_nothing_refers_to_it_when_the_sync_is_over(server, monkeypatch):
    rollback = Rollback()
    held = weakref.ref(rollback)
    with monkeypatch.context() as patch:
        patch.setattr(Rollback, "from_environment", lambda made=[rollback]: made.pop())
        del rollback
        lose(server)
    gc.collect()
    assert held() is None
