# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Sessions of a real worker class, whose engine and model runner are stand-ins."""

import itertools
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vllm.config import VllmConfig
from vllm.model_executor.model_loader.reload import (
    WeightSyncError,
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
    reload_status,
)
from vllm.model_executor.model_loader.reload.agreement import RankFailedError
from vllm.model_executor.model_loader.reload.errors import SyncConflictError
from vllm.v1.worker import weight_update_session
from vllm.v1.worker.gpu_worker import Worker

SOURCE = {"model": "old", "model_weights": "s3://old", "revision": "main"}
NEW_SOURCE = {"model": "new", "model_weights": "", "revision": None}


class Model(nn.Linear):
    """A model that a sync can be opened for."""

    def load_weights(self, weights) -> None:
        for name, weight in weights:
            self.get_parameter(name).data.copy_(weight)


class Engine:
    """Opens a sync, and fails where it is told to."""

    supports_draft_weight_update = True

    def __init__(self, model: nn.Module):
        self.model = model
        self.fails_at = ""
        self.resets = 0
        self.taken = 0
        self.infos: list[dict] = []

    def parse_init_info(self, info: dict) -> dict:
        return info

    def init_transfer_engine(self, info: dict) -> None:
        self.taken += 1

    def shutdown(self) -> None:
        self.taken += 1

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)
        self._fail("start")

    def update_weights(self, info: dict) -> None:
        self.infos.append(info)
        self._fail("update")
        self.model.load_weights(info.items())

    def finish_weight_update(self) -> None:
        self._fail("finish")
        finalize_layerwise_reload(self.model, None)

    def reset_weight_update_target(self) -> None:
        self.resets += 1

    def _fail(self, step: str) -> None:
        if self.fails_at == step:
            raise ValueError(f"{step} failed")


class Others:
    """The other ranks: they vote that a step failed if they are told to."""

    def __init__(self):
        self.fail = False

    @contextmanager
    def agree(self):
        yield
        if self.fail:
            raise RankFailedError("rank 1 of 2 failed")


@pytest.fixture
def others(monkeypatch) -> Others:
    others = Others()
    monkeypatch.setattr(weight_update_session, "agree_across_ranks", others.agree)
    return others


@pytest.fixture
def worker() -> Worker:
    model = Model(2, 2, device="cpu")
    record_metadata_for_reloading(model)
    worker = object.__new__(Worker)
    worker.vllm_config = VllmConfig()
    worker.vllm_config.model_config = SimpleNamespace(**SOURCE)
    worker.rank = 0
    worker.device = torch.device("cpu")
    worker.weight_transfer_engine = Engine(model)
    worker._weight_update_active = False
    worker._weight_update_is_draft = False
    worker.model_runner = SimpleNamespace(
        get_model=lambda: model,
        reset_lora_state=lambda: None,
        reload_weights=lambda: initialize_layerwise_reload(model),
    )
    return worker


def state(worker: Worker) -> str:
    return reload_status(worker.model_runner.get_model()).state


def run(worker: Worker, step: str) -> None:
    if step != "start":
        worker.start_weight_update()
    steps = {
        "start": worker.start_weight_update,
        "update": lambda: worker.update_weights({}),
        "finish": lambda: send_and_finish(worker, {"weight": torch.ones(2, 2)}),
    }
    steps[step]()


def send_and_finish(worker: Worker, weights: dict[str, torch.Tensor]) -> None:
    worker.update_weights(weights)
    worker.finish_weight_update()


NEW = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
STEPS = pytest.mark.parametrize("step", ["start", "update", "finish"])


@STEPS
def test_a_step_that_fails_here_drops_the_sync(step, worker):
    worker.weight_transfer_engine.fails_at = step
    with pytest.raises(ValueError, match=f"{step} failed"):
        run(worker, step)
    assert state(worker) == "serving"
    assert not worker._weight_update_active
    assert worker.weight_transfer_engine.resets == 1


@pytest.mark.parametrize("step", ["start", "update", "prepare"])
def test_a_step_that_fails_elsewhere_drops_the_sync(step, worker, others, monkeypatch):
    monkeypatch.setenv("VLLM_RELOAD_COMMIT", "model")
    steps = {
        "start": worker.start_weight_update,
        "update": lambda: worker.update_weights(dict(NEW)),
        "prepare": worker.prepare_weight_update,
    }
    for before in itertools.takewhile(lambda name: name != step, steps):
        steps[before]()
    others.fail = True
    with pytest.raises(RankFailedError, match="rank 1"):
        steps[step]()
    assert state(worker) == "serving"
    assert not worker._weight_update_active
    assert worker.weight_transfer_engine.resets == 1


@pytest.fixture
def second_of_four(worker) -> Worker:
    """Rank 0 of the second of two replicas that have two ranks each.

    The model is dense, so the replica does not know of the first one.
    """
    parallel = worker.vllm_config.parallel_config
    parallel.world_size, parallel.data_parallel_index = 2, 1
    worker.start_weight_update()
    return worker


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_a_list_has_an_update_for_each_rank(count, second_of_four):
    expected = f"each of 2 in each replica, got a list of {count} in replica 1"
    with pytest.raises(ValueError, match=expected):
        second_of_four.update_weights([{}] * count)
    assert not second_of_four._weight_update_active


def test_a_rank_takes_its_own_update_from_a_list(second_of_four):
    engine = second_of_four.weight_transfer_engine
    biases = [torch.full((2,), float(rank)) for rank in range(4)]
    second_of_four.update_weights([{"bias": bias} for bias in biases])
    assert engine.infos == [{"bias": biases[2]}]


@STEPS
def test_the_next_session_starts_after_a_failure(step, worker):
    worker.weight_transfer_engine.fails_at = step
    with pytest.raises(ValueError, match=f"{step} failed"):
        run(worker, step)
    worker.weight_transfer_engine.fails_at = ""
    worker.start_weight_update()
    assert state(worker) == "updating"


def test_a_second_start_is_refused_and_the_first_session_stays_open(worker):
    worker.start_weight_update()
    with pytest.raises(SyncConflictError, match="already"):
        worker.start_weight_update()
    assert worker._weight_update_active
    assert state(worker) == "updating"


def test_an_aborted_session_is_dropped_and_the_next_one_starts(worker):
    worker.start_weight_update()
    worker.abort_weight_update()
    assert state(worker) == "serving"
    assert not worker._weight_update_active
    worker.start_weight_update()
    assert state(worker) == "updating"


def test_an_abort_without_a_session_leaves_other_syncs_alone(worker):
    initialize_layerwise_reload(worker.model_runner.get_model())
    worker.abort_weight_update()
    assert state(worker) == "updating"


def test_a_session_that_brought_nothing_is_refused(worker):
    worker.start_weight_update()
    worker.update_weights({})
    with pytest.raises(WeightSyncError, match="brought no tensor"):
        worker.finish_weight_update()
    assert not worker._weight_update_active
    assert state(worker) == "serving"


def test_a_session_tells_what_it_updated_and_what_it_kept(worker):
    whole = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
    worker.start_weight_update()
    send_and_finish(worker, whole)
    assert worker.weight_update_reach() == {"updated": ("weight", "bias"), "kept": ()}
    assert worker.weight_update_reach() is None


def test_what_an_earlier_session_updated_is_forgotten(worker):
    worker.start_weight_update()
    send_and_finish(worker, {"weight": torch.ones(2, 2), "bias": torch.ones(2)})
    worker.start_weight_update()
    assert worker.weight_update_reach() is None


def test_a_reload_leaves_an_open_session_alone(worker):
    worker.start_weight_update()
    with pytest.raises(SyncConflictError, match="open already"):
        worker.reload_weights()
    assert worker._weight_update_active
    assert state(worker) == "updating"


@pytest.mark.parametrize("rpc", ["init", "shutdown"])
def test_a_second_trainer_cannot_take_the_engine_away(rpc, worker):
    rpcs = {
        "init": lambda: worker.init_weight_transfer_engine({}),
        "shutdown": worker.shutdown_weight_transfer_engine,
    }
    rpcs[rpc]()
    worker.start_weight_update()
    with pytest.raises(SyncConflictError, match="open already"):
        rpcs[rpc]()
    assert worker._weight_update_active
    assert worker.weight_transfer_engine.taken == 1


@pytest.mark.parametrize("step", ["update", "finish"])
def test_a_step_without_a_start_leaves_other_syncs_alone(step, worker):
    initialize_layerwise_reload(worker.model_runner.get_model())
    with pytest.raises(SyncConflictError, match="start_weight_update"):
        worker.update_weights({}) if step == "update" else worker.finish_weight_update()
    assert state(worker) == "updating"


def test_a_reload_that_fails_elsewhere_is_dropped(worker, others):
    others.fail = True
    with pytest.raises(RankFailedError, match="rank 1"):
        worker.reload_weights()
    assert state(worker) == "serving"


@pytest.fixture
def reader(worker, monkeypatch) -> Worker:
    """A worker that notes where new weights are, and reads none."""
    config = worker.vllm_config.model_config
    note = lambda: vars(config).update(NEW_SOURCE)  # noqa: E731
    monkeypatch.setattr(worker.model_runner, "reload_weights", note)
    return worker


def test_a_reload_notes_where_the_weights_are(reader):
    reader.reload_weights()
    assert vars(reader.vllm_config.model_config) == NEW_SOURCE


def test_a_reload_that_fails_elsewhere_leaves_the_weights_where_they_were(
    reader, others
):
    others.fail = True
    with pytest.raises(RankFailedError, match="rank 1"):
        reader.reload_weights()
    assert vars(reader.vllm_config.model_config) == SOURCE


class Sleeper:
    """A worker that sleeps like one on a GPU: with parameters that are not on a CPU."""

    def __init__(self, kept: tuple[str, ...] = ()):
        self.model = nn.Linear(2, 2, device="meta")
        self.model_runner = SimpleNamespace(get_model=lambda: self.model)
        self._sleep_saved_parameters = dict.fromkeys(kept, torch.empty(0))

    @weight_update_session.drops_weights
    def sleep(self, level: int = 1) -> None:
        pass


def test_weights_that_are_reset_are_lost(worker):
    worker.reset_weights()
    status = reload_status(worker.model_runner.get_model())
    assert (status.state, status.fenced) == ("inconsistent", True)
    assert not worker.model_runner.get_model().weight.any()


def test_weights_are_not_reset_while_a_session_is_open(worker):
    before = worker.model_runner.get_model().weight.clone()
    worker.start_weight_update()
    with pytest.raises(SyncConflictError, match="open already"):
        worker.reset_weights()
    assert worker.model_runner.get_model().weight.equal(before)


@pytest.mark.parametrize("args, kwargs", [((2,), {}), ((), {"level": 2})])
def test_a_level_2_sleep_loses_the_weights(args, kwargs):
    worker = Sleeper()
    worker.sleep(*args, **kwargs)
    assert reload_status(worker.model).state == "inconsistent"
    assert "level 2 sleep" in reload_status(worker.model).detail


@pytest.mark.parametrize("args", [(), (1,)])
def test_a_lighter_sleep_keeps_them(args):
    worker = Sleeper()
    worker.sleep(*args)
    assert reload_status(worker.model).state == "serving"


def test_weights_that_are_all_kept_are_not_lost():
    worker = Sleeper(kept=("weight", "bias"))
    worker.sleep(level=2)
    assert reload_status(worker.model).state == "serving"


def test_weights_of_which_some_are_kept_are_lost():
    worker = Sleeper(kept=("weight",))
    worker.sleep(level=2)
    assert reload_status(worker.model).state == "inconsistent"
