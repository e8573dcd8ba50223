# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a trainer may do wrong: the sync is exact, or it is refused and says why."""

import gc
import weakref
from collections.abc import Iterable

import pytest
import torch

import vllm
from tests.checkpoints import CASES, chunks
from tests.harness.snapshot import Snapshot, assert_same, snapshot
from tests.harness.sync import Weights, sync_parts
from vllm.model_executor.model_loader.reload import (
    WeightSyncError,
    abort_layerwise_reload,
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
    reload_status,
)

CASE = CASES["qwen3_moe-fp8_block"]
EXPERT = "model.layers.0.mlp.experts.0.down_proj.weight"
SCALE = f"{EXPERT}_scale_inv"
LAST = "model.layers.1.mlp.experts.0.down_proj.weight"
Tensors = dict[str, torch.Tensor]


class Server:
    """A model that serves seed 1, and a trainer that syncs seed 2 into it."""

    def __init__(self, built, cold_load):
        self.built = built
        self.new: Tensors = dict(CASE.tensors(2))
        self.before = self.serving()
        self._cold_load = cold_load

    def serving(self) -> Snapshot:
        """What serves, without the sync that is open."""
        values = snapshot(self.built.model).items()
        return {p: value for p, value in values if not p.startswith("load_weights.")}

    def sync(self, *parts: Weights) -> None:
        self.sync_parts(parts)

    def sync_parts(self, parts: Iterable[Weights]) -> None:
        sync_parts(self.built, parts)

    def assert_synced(self) -> None:
        assert_same(self.serving(), self._cold_load(CASE, 2))
        assert reload_status(self.built.model).state == "serving"

    def assert_refused(self) -> None:
        """The old weights serve untouched, or nobody is served until a good sync."""
        if not reload_status(self.built.model).fenced:
            assert_same(self.serving(), self.before)
        self.sync(self.new.items())
        self.assert_synced()


@pytest.fixture(params=["layer", "model"])
def policy(request, monkeypatch) -> str:
    monkeypatch.setenv("VLLM_RELOAD_COMMIT", request.param)
    return request.param


@pytest.fixture
def server(policy, make_model, cold_load, nan_memory) -> Server:
    return Server(make_model(CASE, seed=1), cold_load)


def test_missing_scales_are_named(server):
    weights = {n: t for n, t in server.new.items() if not n.endswith("scale_inv")}
    with pytest.raises(WeightSyncError, match="expert 0 gate: never sent") as error:
        server.sync(weights.items())
    found = {(f.parameter, f.expert, f.shard) for f in error.value.missing}
    assert ("w13_weight_scale_inv", 3, "up") in found
    assert ("w2_weight_scale_inv", 3, "down") in found
    assert not any("norm" in finding.layer for finding in error.value.missing)
    assert len(str(error.value).splitlines()) <= 20
    server.assert_refused()


def test_scale_without_weight_is_an_error(server):
    del server.new[EXPERT]
    with pytest.raises(WeightSyncError, match="w2_weight expert 0 down: never sent"):
        server.sync(server.new.items())
    server.new = dict(CASE.tensors(2))
    server.assert_refused()


def test_weight_sent_twice_before_scales(server):
    weights = [(n, t) for n, t in server.new.items() if not n.endswith("scale_inv")]
    scales = [(n, t) for n, t in server.new.items() if n.endswith("scale_inv")]
    server.sync(weights + [(EXPERT, server.new[EXPERT])] + scales)
    server.assert_synced()


def test_chunks_through_one_reused_bucket(server):
    bucket = torch.empty(1 << 20, dtype=torch.uint8)
    server.sync_parts(chunks(server.new.items(), 1 << 17, bucket))
    server.assert_synced()


def test_no_tensor_of_the_caller_is_kept(server):
    model, _ = server.built
    held = []

    def weights():
        for name, tensor in CASE.tensors(2):
            held.append(weakref.ref(tensor))
            yield name, tensor

    with server.built.worker_context():
        initialize_layerwise_reload(model)
        model.load_weights(weights())
    gc.collect()
    assert [ref() for ref in held] == [None] * len(server.new)


@pytest.mark.parametrize(
    "wrong, message",
    [
        pytest.param(lambda t: t[:3, :3].contiguous(), r"got \[3, 3\]", id="short"),
        pytest.param(lambda t: torch.cat([t, t]), r"expected \[\d+, \d+\]", id="long"),
        pytest.param(lambda t: t.bfloat16(), "got bfloat16", id="dtype"),
    ],
)
def test_wrong_weight_is_refused_at_once(server, wrong, message):
    with server.built.worker_context():
        initialize_layerwise_reload(server.built.model)
        with pytest.raises(WeightSyncError, match=message):
            server.built.model.load_weights([(EXPERT, wrong(server.new[EXPERT]))])
    server.assert_refused()


def test_scale_packed_for_another_engine_is_refused(server):
    packed = server.new[SCALE].repeat(1, 4)[:, :1].contiguous().view(torch.int32)
    with pytest.raises(WeightSyncError, match="expected float32, got int32"):
        server.sync([(SCALE, packed.expand_as(server.new[SCALE]))])
    server.assert_refused()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 0.0])
def test_invalid_scale_is_refused_before_its_layer_serves(server, value):
    bad = server.new | {SCALE: torch.full_like(server.new[SCALE], value)}
    with pytest.raises(WeightSyncError, match="expert 0 down: scale is") as error:
        server.sync(bad.items())
    assert {f.parameter for f in error.value.invalid} == {"w2_weight_scale_inv"}
    now = server.serving()
    experts = [path for path in now if "layers.0.mlp.experts.routed" in path]
    assert experts
    assert_same({p: now[p] for p in experts}, {p: server.before[p] for p in experts})
    server.assert_refused()


def test_invalid_scale_may_be_sent_again(server):
    bad = server.new | {SCALE: torch.full_like(server.new[SCALE], float("nan"))}
    server.sync(bad.items(), [(SCALE, server.new[SCALE])])
    server.assert_synced()


def test_zero_scale_over_a_zero_weight_is_served(server):
    dead = {EXPERT: torch.zeros_like(server.new[EXPERT])}
    server.sync((server.new | dead | {SCALE: server.new[SCALE] * 0}).items())
    assert reload_status(server.built.model).state == "serving"


def test_scales_may_come_in_another_float_type(server):
    rounded = {n: t.bfloat16() for n, t in server.new.items() if n.endswith("_inv")}
    server.sync((server.new | rounded).items())
    got = server.serving()
    server.sync((server.new | {n: t.float() for n, t in rounded.items()}).items())
    assert_same(got, server.serving())


def test_equal_repetition_is_ignored(server):
    server.sync(server.new.items(), [(EXPERT, server.new[EXPERT].clone())])
    server.assert_synced()


def test_other_values_after_the_commit(server, policy):
    other = dict(CASE.tensors(3))[EXPERT]
    if policy == "model":
        server.sync([(EXPERT, other)], server.new.items())
        server.assert_synced()
        server.sync(server.new.items(), [(EXPERT, other)])
        last = server.serving()
        server.sync((server.new | {EXPERT: other}).items())
        assert_same(last, server.serving())
        with pytest.raises(AssertionError):
            server.assert_synced()
        return
    with pytest.raises(WeightSyncError, match="expert 0 down: came again with other"):
        server.sync(server.new.items(), [(EXPERT, other)])
    assert reload_status(server.built.model).fenced
    server.assert_refused()


def test_the_callers_own_error_is_raised_unchanged(server):
    gone = ConnectionResetError("the trainer went away")

    def dies():
        yield from list(server.new.items())[:20]
        raise gone

    with pytest.raises(ConnectionResetError) as error:
        server.sync(dies())
    assert error.value is gone
    server.assert_refused()


@pytest.mark.parametrize("kind", [list, iter])
@pytest.mark.parametrize(
    "nothing, reason",
    [(("not.mine", None), "expected a tensor"), (None, "cannot unpack")],
)
def test_nothing_in_the_place_of_a_tensor_is_no_end(kind, nothing, reason, server):
    for _ in range(2):  # also when the others have routes
        with pytest.raises(WeightSyncError, match=reason):
            server.sync(kind([nothing, *server.new.items()]))
        server.assert_refused()
        server.before = server.serving()


class Halved(list):
    """A list that makes its tensors when it is iterated over, all in one memory."""

    def __iter__(self):
        for name, tensor in super().__iter__():
            if not name.endswith("norm.weight"):
                yield name, tensor
                continue
            BUCKET[: len(tensor)] = tensor / 2
            yield name, BUCKET[: len(tensor)]


BUCKET = torch.zeros(4096, dtype=torch.bfloat16)


def test_a_class_that_is_a_list_too_is_iterated_over(server):
    doubled = {n: t * 2 if n.endswith("norm.weight") else t for n, t in CASE.tensors(2)}
    for _ in range(2):
        server.sync(Halved(doubled.items()))
        server.assert_synced()


def test_nothing_is_loaded_after_a_failure_until_the_sync_is_closed(server):
    model, vllm_config = server.built
    with server.built.worker_context():
        initialize_layerwise_reload(model)
        with pytest.raises(WeightSyncError):
            model.load_weights([(EXPERT, server.new[EXPERT][:3])])
        with pytest.raises(WeightSyncError, match="was aborted"):
            model.load_weights(server.new.items())
        with pytest.raises(WeightSyncError, match="was aborted"):
            finalize_layerwise_reload(model, vllm_config.model_config)
    assert_same(server.serving(), server.before)
    server.assert_refused()


def test_old_weights_serve_until_the_end(server, policy):
    model, _ = server.built
    with server.built.worker_context():
        initialize_layerwise_reload(model)
        model.load_weights(list(server.new.items())[:-1])
        status = reload_status(model)
        assert status.state == "updating"
        assert status.fenced == (policy == "layer") == ("committed" in status.detail)
        if policy == "model":
            assert_same(server.serving(), server.before)
        abort_layerwise_reload(model, "test")
    server.assert_refused()


def test_another_start_aborts_the_open_sync(server):
    initialize_layerwise_reload(server.built.model)
    server.sync(server.new.items())
    server.assert_synced()


def test_layers_that_receive_nothing_keep_their_weights(server):
    experts = {n: t for n, t in server.new.items() if "layers.0.mlp.experts" in n}
    server.sync(experts.items())
    now, cold = server.serving(), server._cold_load(CASE, 2)
    for path in now:
        new = "layers.0.mlp.experts." in path and ".gate." not in path
        assert_same({path: now[path]}, {path: (cold if new else server.before)[path]})


@pytest.mark.parametrize("policy", ["layer", "model"])
def test_experts_are_not_owed_for_what_they_read_of_their_router(
    policy, make_model, cold_load, monkeypatch
):
    """In DeepSeek-V3 its correction bias is a parameter of the experts' layer too."""
    monkeypatch.setenv("VLLM_RELOAD_COMMIT", policy)
    case = CASES["deepseek_v3-fp8_block"]
    model, _ = built = make_model(case, seed=1)
    sync_parts(built, [[(n, t) for n, t in case.tensors(2) if ".experts." not in n]])
    now, new, old = snapshot(model), cold_load(case, 2), cold_load(case, 1)
    if not any(".routed_experts.e_score_correction_bias" in path for path in now):
        pytest.skip("in this base their layer does not hold it")
    for path in now:
        is_kept = ".experts.routed_experts." in path and "bias" not in path
        assert_same({path: now[path]}, {path: (old if is_kept else new)[path]})


def test_addresses_stay(server):
    def addresses():
        params = server.built.model.named_parameters()
        return {name: param.data_ptr() for name, param in params}

    before = addresses()
    server.sync(server.new.items())
    assert addresses() == before


def test_dummy_weights_owe_everything(policy, make_model, cold_load, nan_memory):
    model, vllm_config = built = make_model(CASE, seed=1, load_format="dummy")
    assert reload_status(model).state == "inconsistent"
    assert not reload_status(model).fenced
    server = Server(built, cold_load)
    with server.built.worker_context():
        initialize_layerwise_reload(model)
        short = server.new[EXPERT][:3, :3].contiguous()
        with pytest.raises(WeightSyncError, match=r"expert 0 down: got \[3, 3\]"):
            model.load_weights([(EXPERT, short)])
    norm = "model.layers.1.input_layernorm.weight"
    lacking = {n: t for n, t in server.new.items() if n != norm}
    with pytest.raises(WeightSyncError, match="layers.1.input_layernorm.weight"):
        server.sync(lacking.items())
    server.sync(server.new.items())
    server.assert_synced()


@pytest.mark.xfail(
    vllm.__version__.startswith("0.22"), reason="not known yet who holds the layers"
)
def test_a_model_can_be_freed(make_model):
    server = Server(make_model(CASE, seed=1), None)
    server.sync(server.new.items())
    layers = [weakref.ref(layer) for layer in server.built.model.modules()]
    del server
    gc.unfreeze()
    for _ in range(2):  # tensors whose Python half dies first need a second pass
        gc.collect()
    assert not [layer() for layer in layers if layer() is not None]


def test_tensors_that_came_to_share_memory_must_stay_equal(policy, make_model):
    """A repeated output projection was tied on load; another checkpoint differs."""
    model, vllm_config = built = make_model(CASE, seed=1)
    norms = [model.model.layers[i].input_layernorm for i in (0, 1)]
    norms[1].weight = norms[0].weight
    new = dict(CASE.tensors(2))
    with built.worker_context():
        initialize_layerwise_reload(model)
        with pytest.raises(WeightSyncError, match="whose memory it shares"):
            model.load_weights(new.items())
            finalize_layerwise_reload(model, vllm_config.model_config)
        abort_layerwise_reload(model, "test")
        initialize_layerwise_reload(model)
        name = "model.layers.{}.input_layernorm.weight"
        new[name.format(1)] = new[name.format(0)]
        model.load_weights(new.items())
        finalize_layerwise_reload(model, vllm_config.model_config)
    assert torch.equal(norms[1].weight, new[name.format(0)])


def test_finish_without_start_is_an_error(server):
    with pytest.raises(WeightSyncError, match="no weight sync is open"):
        finalize_layerwise_reload(server.built.model, None)


HALVES = ("top", "bottom")


class TwoLayers(torch.nn.Module):
    """Layers that come in halves."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(4, 4, bias=False)
        self.second = torch.nn.Linear(4, 4, bias=False)
        self.requires_grad_(False)

    def load_weights(self, weights) -> None:
        for name, tensor in weights:
            layer, half = name.split(".")
            rows = slice(2) if half == "top" else slice(2, 4)
            getattr(self, layer).weight.data[rows].copy_(tensor)


def test_without_a_first_load_each_layer_is_owed_until_it_came(policy):
    halves = torch.ones(2, 4)
    sent = {f"{layer}.{h}": halves for layer in ("first", "second") for h in HALVES}
    model = TwoLayers()
    record_metadata_for_reloading(model)
    before = model.second.weight.clone()

    def sync(*names: str) -> None:
        initialize_layerwise_reload(model)
        model.load_weights([(name, sent[name]) for name in names])
        finalize_layerwise_reload(model, None)

    sync("first.top", "first.bottom")
    for _ in range(2):
        with pytest.raises(WeightSyncError, match="second.weight: never sent"):
            sync("second.top")
        assert torch.equal(model.second.weight, before)
    sync("second.bottom", "second.top")
    assert model.second.weight.eq(1).all()
    sync(*sent)
    with pytest.raises(WeightSyncError, match="second.weight: never sent"):
        sync("second.top")
