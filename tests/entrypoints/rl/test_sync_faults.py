# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What may go wrong while a trainer syncs into a server: many faults in a row, or one.

`SYNC_SCHEDULES` sets how many random schedules are tried.
"""

import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from multiprocessing.shared_memory import SharedMemory

import pytest
import requests
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from examples.rl.shm_trainer import Trainer
from tests.checkpoints import write_checkpoint
from tests.harness.completion import Answer, answer_of
from tests.harness.fault_bench import CASE, PIECES, A, B, FaultBench, starting_bench
from tests.harness.fault_schedule import SHORT_REQUEST, FaultSchedule
from tests.harness.lost_client import Leaves, lose, run_and_kill
from tests.harness.packed import Damage, bucket_of_a_trainer, pack
from tests.harness.server import KEY

SCHEDULES = int(os.environ.get("SYNC_SCHEDULES", "500"))
STEPS = 10
ALL = range(PIECES)
# How many chunks a trainer has sent when it is killed, and how far it is with the next.
KILLS = {
    "before the first chunk": (0, None),
    "between chunks": (2, None),
    "in a chunk, half sent": (2, Leaves.HALF_WAY),
    "in a chunk, all sent": (2, Leaves.AT_ONCE),
    "in a chunk, answer unread": (2, Leaves.UNREAD),
}
EXPERT = "model.layers.0.mlp.experts.99.down_proj.weight"


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Iterator[FaultBench]:
    with starting_bench(tmp_path_factory.mktemp("checkpoints")) as bench:
        yield bench


@pytest.fixture
def trainer(bench) -> Iterator[Trainer]:
    """A trainer whose server serves A, and old weights until a sync is whole."""
    bench.call("choose_policy", commit="model", rollback="off")
    assert bench.server.post("abort_weight_update", {}).ok
    with closing(Trainer(bench.server.url, KEY, 1 << 20)) as trainer:
        trainer.sync(CASE.tensors(A))
        yield trainer


@pytest.fixture
def bucket(bench, trainer) -> Iterator[SharedMemory]:
    """The bucket that the server has mapped."""
    with bucket_of_a_trainer() as bucket:
        init(bench, bucket)
        yield bucket


def init(bench: FaultBench, bucket: SharedMemory) -> None:
    body = {"init_info": {"segment": bucket.name}}
    assert bench.server.post("init_weight_transfer_engine", body).ok


def post(bench: FaultBench, step: str) -> int:
    """Ask to start, finish or abort a sync; return the status."""
    return bench.server.post(f"{step}_weight_update", {}).status_code


def send(bench: FaultBench, bucket: SharedMemory, numbers: Iterable[int]) -> None:
    """Send pieces of B, each in a chunk."""
    for number in numbers:
        body = pack(bench.tensors[B][number]).write(bucket)
        answer = bench.server.post("update_weights", body)
        assert answer.ok, answer.text


def ask(bench: FaultBench) -> Answer:
    return answer_of(bench.server.post("v1/completions", SHORT_REQUEST))


def error_of(answer: requests.Response, status: int) -> dict:
    assert answer.status_code == status, answer.text
    return answer.json()["error"]


@pytest.mark.timeout(0)
def test_no_schedule_of_faults_corrupts_or_kills(bench):
    run_state_machine_as_test(
        lambda: FaultSchedule(bench),
        settings=settings(
            max_examples=SCHEDULES,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            # A schedule is short, and a server that has failed may go on failing.
            phases=[Phase.generate],
            derandomize="SYNC_SCHEDULES" not in os.environ,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize(("sent", "leaves"), KILLS.values(), ids=KILLS)
def test_a_trainer_that_is_killed(bench, bucket, sent, leaves):
    def train() -> None:
        assert post(bench, "start") == 200
        send(bench, bucket, ALL[:sent])
        if leaves is not None:
            chunk = pack(bench.tensors[B][sent]).write(bucket)
            lose(bench.server, "update_weights", chunk, leaves)

    before = ask(bench)
    run_and_kill(train)
    assert ask(bench) == before
    assert bench.served_digests() == bench.digests[A]
    assert post(bench, "start") == 409
    assert post(bench, "abort") == 200
    sync_anew(bench)


def sync_anew(bench: FaultBench) -> None:
    """Let another trainer sync B."""
    with closing(Trainer(bench.server.url, KEY, 1 << 20)) as trainer:
        trainer.sync(CASE.tensors(B))
    assert bench.served_digests() == bench.digests[B]


def test_a_start_that_is_reset_half_way_opens_nothing(bench, bucket):
    lose(bench.server, "start_weight_update", {}, Leaves.HALF_WAY)
    assert post(bench, "finish") == 409
    sync_anew(bench)


def test_a_chunk_that_is_reset_half_way_is_not_loaded(bench, bucket):
    assert post(bench, "start") == 200
    send(bench, bucket, ALL[:3])
    chunk = pack(Damage.WRONG_SHAPE.apply(bench.tensors[B][3]))  # it would end the sync
    lose(bench.server, "update_weights", chunk.write(bucket), Leaves.HALF_WAY)
    send(bench, bucket, ALL[3:])
    assert post(bench, "finish") == 200
    assert bench.served_digests() == bench.digests[B]


def test_a_finish_that_is_reset_half_way_commits_nothing(bench, bucket):
    assert post(bench, "start") == 200
    send(bench, bucket, ALL)
    lose(bench.server, "finish_weight_update", {}, Leaves.HALF_WAY)
    assert bench.served_digests() == bench.digests[A]
    assert post(bench, "finish") == 200
    assert bench.served_digests() == bench.digests[B]


def test_a_finish_whose_answer_is_lost_is_done(bench, bucket):
    assert post(bench, "start") == 200
    send(bench, bucket, ALL)
    lose(bench.server, "finish_weight_update", {}, Leaves.UNREAD)
    assert post(bench, "finish") == 409
    assert bench.served_digests() == bench.digests[B]


@pytest.mark.parametrize("commit", ["model", "layer"])
@pytest.mark.parametrize(
    "numbers",
    [
        pytest.param([n for n in ALL for _ in range(2)], id="each twice"),
        pytest.param([*ALL, *ALL], id="all twice"),
        pytest.param([*reversed(ALL)], id="out of order"),
    ],
)
def test_chunks_that_are_replayed_or_out_of_order(bench, bucket, commit, numbers):
    bench.call("choose_policy", commit=commit, rollback="off")
    assert post(bench, "start") == 200
    send(bench, bucket, numbers)
    assert post(bench, "finish") == 200
    assert bench.served_digests() == bench.digests[B]


def test_a_chunk_that_is_replayed_does_not_stand_for_another(bench, bucket):
    assert post(bench, "start") == 200
    send(bench, bucket, [0, 1, 1, 3, 4, 5])
    error = error_of(bench.server.post("finish_weight_update", {}), 422)
    assert {found["detail"] for found in error["missing"]} == {"never sent"}
    assert bench.served_digests() == bench.digests[A]


@pytest.mark.parametrize("commit", ["model", "layer"])
def test_the_second_finish_is_refused(bench, bucket, commit):
    bench.call("choose_policy", commit=commit, rollback="off")
    assert post(bench, "start") == 200
    send(bench, bucket, ALL)
    assert post(bench, "finish") == 200
    after = ask(bench)
    assert post(bench, "finish") == 409
    assert ask(bench) == after
    assert bench.served_digests() == bench.digests[B]


def test_a_sync_that_brings_nothing_is_refused(bench, trainer):
    before = ask(bench)
    assert bench.server.post("start_weight_update", {}).ok
    error = error_of(bench.server.post("finish_weight_update", {}), 422)
    assert "brought no tensor" in error["message"]
    assert ask(bench) == before
    trainer.sync(CASE.tensors(B))


def test_a_sync_of_a_part_says_how_large_it_is(bench, trainer):
    norm = "model.norm.weight"
    chunk = pack([(norm, dict(CASE.tensors(B))[norm])])
    with bucket_of_a_trainer() as bucket:
        trainer.post("init_weight_transfer_engine", init_info={"segment": bucket.name})
        trainer.post("start_weight_update")
        trainer.post("update_weights", **chunk.write(bucket))
    told = bench.server.post("finish_weight_update", {}).json()
    assert told["updated"] == 1
    assert told["kept"] > 20 == len(told["kept_parameters"])
    assert norm not in told["kept_parameters"]


def test_an_expert_that_does_not_exist_is_named(bench, trainer):
    before = ask(bench)
    tensors = [*CASE.tensors(B), (EXPERT, next(CASE.tensors(B))[1])]
    with pytest.raises(requests.HTTPError) as raised:
        trainer.sync(tensors)
    error = error_of(raised.value.response, 422)
    (found,) = error["invalid"]
    assert (found["parameter"], found["expert"]) == (EXPERT, 99)
    assert "the layer has 2" in found["detail"]
    assert ask(bench) == before


def test_a_reload_from_disk_waits_for_an_open_sync(bench, trainer):
    before = ask(bench)
    assert bench.server.post("start_weight_update", {}).ok
    folder = str(bench.folders[B])
    error_of(bench.call("reload_weights", weights_path=folder), 409)
    assert bench.server.post("abort_weight_update", {}).ok
    assert ask(bench) == before
    assert bench.call("reload_weights", weights_path=folder).ok
    assert ask(bench) != before


def test_a_worker_without_memory_is_told_apart(bench, trainer):
    before = ask(bench)
    bench.call("limit_memory", tensors="3")
    with pytest.raises(requests.HTTPError) as raised:
        trainer.sync(CASE.tensors(B))
    bench.call("behave")
    error = error_of(raised.value.response, 507)
    assert "no memory to stage model." in error["message"]
    assert ask(bench) == before


def test_a_file_cut_down_on_a_full_disk_is_named(bench, trainer, tmp_path):
    before = ask(bench)
    folder = write_checkpoint(CASE, B, tmp_path, tokenizer=True)
    whole = folder / "model.safetensors"
    os.truncate(whole, whole.stat().st_size // 2)
    error = error_of(bench.call("reload_weights", weights_path=str(folder)), 422)
    assert "was cut short: model.layers.0." in error["message"]
    assert ask(bench) == before
    write_checkpoint(CASE, A, tmp_path, tokenizer=True)
    assert bench.call("reload_weights", weights_path=str(folder)).ok
    assert ask(bench) == before


def test_sigterm_during_a_commit_ends_the_server(bench, trainer):
    """The last one of these tests: it leaves no server."""
    bench.call("commit_slowly", seconds="0.2")
    syncing = threading.Thread(target=sync_and_be_lost, args=[trainer])
    syncing.start()
    log = bench.folders[A].parent / "server.log"
    while "a layer is being committed" not in log.read_text():
        time.sleep(0.05)
    bench.server.process.terminate()
    assert bench.server.process.wait(60) is not None
    syncing.join(60)
    assert not syncing.is_alive()


def sync_and_be_lost(trainer: Trainer) -> None:
    with pytest.raises(requests.RequestException):
        trainer.sync(CASE.tensors(B))
