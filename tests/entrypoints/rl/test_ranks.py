# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A trainer syncs into running servers of two ranks, and one of the ranks fails.

One server for each kind of parallelism, on a CPU or on two GPUs. It has loaded B, so
what it answers at first is what any server has to answer after a sync of B. The last
test of each kills a rank.
"""

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import psutil
import pytest
import requests
import torch
from packaging.version import Version

import vllm
from examples.rl.shm_trainer import Trainer
from tests.checkpoints import CASES, Case, Sizes, write_checkpoint
from tests.harness.completion import Answer, ask
from tests.harness.server import GPU_OPTIONS, KEY, Server, refused, starting
from tests.harness.threads import one_thread

pytestmark = pytest.mark.skipif(
    torch.accelerator.device_count() == 1, reason="two ranks need two GPUs"
)

ON_GPU = torch.cuda.is_available()
FP8_BLOCK = CASES["qwen3_moe-fp8_block"]
# Whole scale blocks on each rank, of experts and of attention.
SIZES = Sizes(head_dim=128, intermediate=256)
CASE = Case(FP8_BLOCK.architecture, FP8_BLOCK.quantization, sizes=SIZES)
A, B = 1, 2
BUCKET_BYTES = 1 << 20
OPTIONS = [
    *("--max-model-len", "256", "--max-num-seqs", "4"),
    *("--weight-transfer-config", '{"backend": "shm"}'),
    *(GPU_OPTIONS if ON_GPU else ()),
]
# What rank 1 serves, whether layers, experts or their columns are shared out.
SCALE = "model.layers.1.mlp.experts.7.down_proj.weight_scale_inv"
LAYER = "model.layers.1.mlp.experts"
DEATH_SECONDS = 60

Named = tuple[str, torch.Tensor]


@dataclass(frozen=True)
class Parallelism:
    """How two ranks share a model.

    Attributes:
        options: of the command line.
        expert: what the owners of `SCALE` call its expert.
        owners: the ranks that need a part of `SCALE`.
        dies: the request during which rank 1 dies; before it, if there is none.
    """

    options: tuple[str, ...]
    expert: int
    owners: tuple[int, ...]
    dies: str | None


EAGER = "--enforce-eager"
# The released CPU worker makes the buffers between stages only when it compiles.
COMPILED = ("--compilation-config", '{"mode": 1, "backend": "eager"}')
STAGED = (EAGER,) if ON_GPU else COMPILED
PARALLELISMS = {
    "tp": Parallelism((EAGER, "-tp=2"), 7, (0, 1), "update_weights"),
    "ep": Parallelism((EAGER, "-tp=2", "--enable-expert-parallel"), 3, (1,), None),
    "pp": Parallelism((*STAGED, "-pp=2"), 7, (1,), "finish_weight_update"),
}


@dataclass(frozen=True)
class Running:
    """A server, how its ranks share the model, and what it answered at first."""

    server: Server
    parallelism: Parallelism
    fresh_b: Answer

    def processes(self) -> list[psutil.Process]:
        """Return the processes of the ranks, in order."""
        children = psutil.Process(self.server.process.pid).children(recursive=True)
        running = [c for c in children if c.status() != psutil.STATUS_ZOMBIE]
        titles = {title_of(child): child for child in running}
        return [titles[t] for t in sorted(titles) if t.startswith("VLLM::Worker_")]


@pytest.fixture(scope="module", params=PARALLELISMS)
def running(request, tmp_path_factory) -> Iterator[Running]:
    amx = torch.cpu._is_amx_tile_supported() and not ON_GPU
    if request.param == "ep" and amx:
        pytest.skip("the released kernel for AMX fails where experts are shared out")
    folder = tmp_path_factory.mktemp(request.param)
    model = write_checkpoint(CASE, B, folder / "model", tokenizer=True)
    parallelism = PARALLELISMS[request.param]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        "VLLM_RELOAD_COMMIT": "model",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
    }
    options = [*OPTIONS, *parallelism.options]
    with (
        one_thread(),  # the cores are for the ranks
        starting(model, folder / "log", options, environment) as server,
    ):
        server.wait()
        yield Running(server, parallelism, ask(server))


@pytest.fixture
def server(running) -> Server:
    return running.server


@pytest.fixture
def trainer(server) -> Iterator[Trainer]:
    with closing(Trainer(server.url, KEY, BUCKET_BYTES)) as trainer:
        yield trainer


def title_of(process: psutil.Process) -> str:
    return " ".join(process.cmdline())


class UnequalTrainer(Trainer):
    """Does not tell rank 1 of `SCALE`."""

    def post(self, route: str, **body: Any) -> None:
        if route == "update_weights":
            info = body["update_info"]
            body["update_info"] = [info, without_scale(info)]
        super().post(route, **body)


def without_scale(info: dict[str, Any]) -> dict[str, Any]:
    kept = [n for n, name in enumerate(info["names"]) if name != SCALE]
    lists = {k: [v[n] for n in kept] for k, v in info.items() if isinstance(v, list)}
    return {**info, **lists}


def layer_of(found: dict[str, Any]) -> str:
    """Return the layer that is named; from 0.32 on experts are one inside of it."""
    return found["layer"].removesuffix(".routed_experts")


def test_a_sync_serves_what_a_fresh_server_serves(running, server, trainer):
    trainer.sync(CASE.tensors(A))
    assert ask(server) != running.fresh_b
    trainer.sync(CASE.tensors(B))
    assert ask(server) == running.fresh_b


def test_a_scale_that_is_never_sent_is_named_by_its_owners(running, server, trainer):
    before = ask(server)
    status, error = refused(trainer.sync, (t for t in CASE.tensors(A) if t[0] != SCALE))
    assert status == 422
    (found,) = error["missing"]
    assert (layer_of(found), found["parameter"]) == (LAYER, "w2_weight_scale_inv")
    assert (found["expert"], found["shard"]) == (running.parallelism.expert, "down")
    assert found["ranks"] == [*running.parallelism.owners]
    assert ask(server) == before


@pytest.mark.skipif(
    Version(vllm.__version__) < Version("0.32"), reason="takes no list for its ranks"
)
def test_what_one_rank_lacks_no_rank_serves(running, server):
    before = ask(server)
    with closing(UnequalTrainer(server.url, KEY, BUCKET_BYTES)) as trainer:
        status, error = refused(trainer.sync, CASE.tensors(A))
    assert status == 422
    (found,) = error["missing"]
    assert (layer_of(found), found["parameter"]) == (LAYER, "w2_weight_scale_inv")
    assert (found["detail"], found["ranks"]) == ("never sent", [1])
    assert "rank 1 of 2 failed" in error["message"]
    assert ask(server) == before


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_scale_of_one_rank_is_served_by_none(server, trainer, value):
    before = ask(server)
    tensors = dict(CASE.tensors(A))
    tensors[SCALE][0, 1] = value  # where columns are shared out, rank 1 has this one
    status, error = refused(trainer.sync, tensors.items())
    assert status == 422
    (found,) = error["invalid"]
    assert (layer_of(found), found["parameter"]) == (LAYER, "w2_weight_scale_inv")
    assert f"scale is {value}" in found["detail"]
    assert found["ranks"] == [1]
    assert ask(server) == before


def test_after_all_that_a_sync_is_whole(running, server, trainer):
    trainer.sync(CASE.tensors(A))
    assert ask(server) != running.fresh_b
    trainer.sync(CASE.tensors(B))
    assert ask(server) == running.fresh_b


class Killer(Trainer):
    """Kills a rank: before the second chunk, or while the others are at a request.

    Attributes:
        victim: the rank's process.
        during: route of that request, if it is one.
        errors: what the server has answered since, status and text.
    """

    def __init__(self, server: Server, victim: psutil.Process, during: str | None):
        self.victim, self.during = victim, during
        self.errors: list[tuple[int, str]] = []
        self._sent = 0
        super().__init__(server.url, KEY, BUCKET_BYTES)

    def post(self, route: str, **body: Any) -> None:
        if route == "update_weights":
            self._sent += 1
            if self._sent == 2 and self.during is None:
                self.victim.send_signal(signal.SIGKILL)
        try:
            if self._sent > 1 and self.during == route:
                self._kill_meanwhile(route, body)
            else:
                super().post(route, **body)
        except requests.HTTPError as error:
            self.errors.append((error.response.status_code, str(error)))
            raise

    def _kill_meanwhile(self, route: str, body: dict[str, Any]) -> None:
        self.victim.send_signal(signal.SIGSTOP)
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(super().post, route, **body)
            time.sleep(1)
            assert not answer.done()
            self.victim.send_signal(signal.SIGKILL)
            answer.result()


def test_a_rank_that_is_killed_ends_the_server(running, server):
    ranks = running.processes()
    killer = Killer(server, ranks[1], running.parallelism.dies)
    with closing(killer), pytest.raises(requests.RequestException):
        killer.sync(CASE.tensors(A))
    status, reason = killer.errors[0]
    assert status == 500
    assert "process of a worker is gone" in reason or "EngineCore" in reason
    server.process.wait(DEATH_SECONDS)
    assert psutil.wait_procs(ranks, DEATH_SECONDS)[1] == []
    assert "Worker proc VllmWorker-1 died" in server.log.read_text()
