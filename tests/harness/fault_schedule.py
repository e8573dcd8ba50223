# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Random schedules of what trainers and clients do to a server that lives on.

    with starting_bench(folder) as bench:
        run_state_machine_as_test(lambda: FaultSchedule(bench), settings=...)

After each step: its status is the one that `SyncOracle` expects, and what is served is
bit by bit what was committed last, or a refusal with its reason while that is allowed.
At the end of each schedule a complete sync must be served.
"""

import math
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import requests
import torch
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from tests.harness.completion import REQUEST, answer_of
from tests.harness.fault_bench import CASE, PIECES, A, B, FaultBench, Named
from tests.harness.lost_client import Leaves, lose, run_and_kill
from tests.harness.packed import (
    BUCKET_BYTES,
    PREFIX,
    Damage,
    Packed,
    bucket_of_a_trainer,
    is_scale,
    pack,
)
from tests.harness.sync_oracle import SyncOracle

__all__ = ["SHORT_REQUEST", "FaultSchedule"]

UNPROCESSABLE = HTTPStatus.UNPROCESSABLE_ENTITY
SHORT_REQUEST = {**REQUEST, "max_tokens": 2}
LONG_REQUEST = {**REQUEST, "max_tokens": 24}


@dataclass(frozen=True)
class Policy:
    """When layers are committed, and what becomes of them if a sync fails."""

    commit: str
    rollback: str

    @property
    def serves_on(self) -> bool:
        """Whether old weights serve until the sync is finished."""
        return self.commit == "model"

    @property
    def loses_layers(self) -> bool:
        """Whether a sync that fails may leave a mixture."""
        return self.commit == "layer" and self.rollback == "off"


POLICIES = (Policy("model", "off"), Policy("layer", "host"), Policy("layer", "off"))


class FaultSchedule(RuleBasedStateMachine):
    """One schedule; the server has A at its begin and at its end."""

    def __init__(self, bench: FaultBench):
        super().__init__()
        self.bench, self.server = bench, bench.server
        self.policy = POLICIES[0]
        self.oracle = SyncOracle(dict(CASE.tensors(A)), A)
        self.held = ExitStack()
        self.bucket = self.held.enter_context(bucket_of_a_trainer())
        self.mapped: str | None = None
        self.clients = ThreadPoolExecutor(1)
        self.waiting: list[tuple[int, Future]] = []

    # What trainers do.

    @initialize(policy=st.sampled_from(POLICIES), seed=st.sampled_from([B, A, None]))
    def begin(self, policy: Policy, seed: int | None) -> None:
        """Choose a policy and, mostly, open a sync: many faults need one."""
        self.policy = policy
        assert self.bench.call("choose_policy", **vars(policy)).ok
        self._init()
        if seed is not None:
            self.start(seed)

    @rule()
    def init(self) -> None:
        self._init()

    @rule(seed=st.sampled_from((A, B)))
    def start(self, seed: int) -> None:
        self._do("start", "start_weight_update", {}, self.oracle.start(seed))

    @rule(seed=st.sampled_from((A, B)))
    def start_over(self, seed: int) -> None:
        self.abort()
        self._init()
        self.start(seed)

    @rule(numbers=st.lists(st.integers(0, PIECES - 1), min_size=1, max_size=3))
    def send(self, numbers: list[int]) -> None:
        for number in numbers:
            self._send("chunk", self._tensors(number))

    @rule(order=st.permutations(range(PIECES)))
    @precondition(lambda self: self.oracle.is_open)
    def send_all(self, order: list[int]) -> None:
        self.send(order)

    @rule(number=st.integers(0, PIECES - 1), damage=st.sampled_from(Damage))
    @precondition(lambda self: self.oracle.is_open)
    def send_damaged(self, number: int, damage: Damage) -> None:
        tensors = damage.apply(self._tensors(number))
        refused = damage in (Damage.WRONG_SHAPE, Damage.NO_SUCH_EXPERT)
        refusal = HTTPStatus.UNPROCESSABLE_ENTITY if refused else None
        bad = [n for n, t in tensors if is_scale(n) and t.isnan().any()]
        self._send(damage.value, tensors, refusal, bad)

    @rule(number=st.integers(0, PIECES - 1))
    @precondition(lambda self: self.oracle.is_open)
    def send_beyond_the_bucket(self, number: int) -> None:
        chunk = pack(self._tensors(number)).beyond(BUCKET_BYTES)
        self._send_refused("chunk beyond the bucket", chunk.write(self.bucket))

    @rule(number=st.integers(0, PIECES - 1))
    @precondition(lambda self: self.oracle.is_open)
    def send_in_a_bucket_cut_down(self, number: int) -> None:
        body = pack(self._tensors(number)).write(self.bucket)
        file = Path("/dev/shm", self.bucket.name)
        with file.open("r+b") as segment:
            segment.truncate(BUCKET_BYTES // 2)
            self._send_refused("bucket cut down", body)
            segment.truncate(BUCKET_BYTES)

    @rule(
        number=st.integers(0, PIECES - 1),
        segment=st.sampled_from([f"{PREFIX}none", "../x", "psm_1234", ""]),
    )
    @precondition(lambda self: self.oracle.is_open)
    def send_from_another_segment(self, number: int, segment: str) -> None:
        body = pack(self._tensors(number)).write(self.bucket)
        body["update_info"]["segment"] = segment
        self._send_refused("other segment", body)

    @rule()
    def finish(self) -> None:
        with self._may_lose():
            status = self.oracle.finish()
            self._do("finish", "finish_weight_update", {}, status)

    @rule()
    def abort(self) -> None:
        with self._may_lose():
            self.oracle.drop()
            self._do("abort", "abort_weight_update", {}, HTTPStatus.OK)

    @rule(seed=st.sampled_from((A, B)))
    def reload_from_disk(self, seed: int) -> None:
        body = {
            "method": "reload_weights",
            "kwargs": {"weights_path": str(self.bench.folders[seed])},
        }
        status = self.oracle.reload(seed)
        self._do("reload_weights", "collective_rpc", body, status)

    # How they are lost.

    @rule(
        route=st.sampled_from(["start", "update", "finish"]),
        number=st.integers(0, PIECES - 1),
    )
    def lose_half_way(self, route: str, number: int) -> None:
        body: dict[str, Any] = {}
        if route == "update":
            body = pack(self._tensors(number)).write(self.bucket)
        path = "update_weights" if route == "update" else f"{route}_weight_update"
        lose(self.server, path, body, Leaves.HALF_WAY)
        self._count(f"connection reset in {route}", "no effect")

    @rule(number=st.integers(0, PIECES - 1))
    @precondition(lambda self: self.mapped == self.bucket.name)
    def lose_the_answer_to_a_chunk(self, number: int) -> None:
        tensors = self._tensors(number)
        body = pack(tensors).write(self.bucket)
        lose(self.server, "update_weights", body, Leaves.UNREAD)
        status = self.oracle.chunk(dict(tensors))
        self._count("answer to chunk unread", status.name)

    @rule()
    def lose_the_answer_to_finish(self) -> None:
        with self._may_lose():
            lose(self.server, "finish_weight_update", {}, Leaves.UNREAD)
            status = self.oracle.finish()
            self._count("answer to finish unread", status.name)

    @rule(when=st.sampled_from([Leaves.HALF_WAY, Leaves.UNREAD]))
    def lose_a_client(self, when: Leaves) -> None:
        lose(self.server, "v1/completions", SHORT_REQUEST, when)
        self._count(f"client lost {when.value}", "no effect")

    @rule(
        seed=st.sampled_from((A, B)),
        order=st.permutations(range(PIECES)),
        count=st.integers(0, PIECES),
        leaves=st.sampled_from([None, *Leaves]),
    )
    def kill_a_trainer(
        self, seed: int, order: list[int], count: int, leaves: Leaves | None
    ) -> None:
        """It has its own bucket; the next trainer starts over."""
        self.abort()
        numbers = [*order[:count], order[0]]
        chunks = [pack(self.bench.tensors[seed][n]) for n in numbers]
        with bucket_of_a_trainer() as bucket:
            run_and_kill(lambda: self._train(bucket, chunks, leaves))
        inside = f"in a chunk, {leaves.value}" if leaves else "between chunks"
        self._count(f"trainer killed {inside}", "sync left open")
        self.oracle.start(seed)
        self.mapped = bucket.name
        for number in order[:count]:
            self.oracle.chunk(dict(self.bench.tensors[seed][number]))
        if leaves is Leaves.AT_ONCE:  # nobody knows whether it got through
            self.start_over(seed)
        elif leaves is Leaves.UNREAD:
            self.oracle.chunk(dict(self.bench.tensors[seed][order[0]]))

    @rule(number=st.integers(0, PIECES - 1), tensors=st.integers(0, 6))
    @precondition(lambda self: self.mapped == self.bucket.name)
    def run_out_of_memory(self, number: int, tensors: int) -> None:
        assert self.bench.call("limit_memory", tensors=str(tensors)).ok
        body = pack(self._tensors(number)).write(self.bucket)
        answer = self.server.post("update_weights", body)
        (told,) = self.bench.call("behave").json()["results"]
        if told["ran_out"]:
            with self._may_lose():
                status = self.oracle.refused_chunk(HTTPStatus.INSUFFICIENT_STORAGE)
                self._judge("out of memory", answer, status)
        else:
            status = self.oracle.chunk(dict(self._tensors(number)))
            self._judge("chunk", answer, status)

    # What clients do.

    @rule()
    def ask(self) -> None:
        answer = self.server.post("v1/completions", SHORT_REQUEST)
        if answer.status_code == HTTPStatus.SERVICE_UNAVAILABLE:
            self._judge_refusal(answer)
            return
        self._judge("completion", answer, HTTPStatus.OK)
        assert not self.oracle.lost
        self._judge_answer("short", answer)

    @rule()
    @precondition(lambda self: not self.waiting)
    def begin_to_ask(self) -> None:
        asked = self.clients.submit(self.server.post, "v1/completions", LONG_REQUEST)
        self.waiting.append((self.oracle.commits, asked))

    @rule()
    @precondition(lambda self: self.waiting)
    def wait_for_the_answer(self) -> None:
        commits, asked = self.waiting.pop()
        answer = asked.result()
        if answer.status_code == HTTPStatus.SERVICE_UNAVAILABLE:
            assert not self.policy.serves_on
            self._count("completion in flight", "refused")
            return
        self._judge("completion in flight", answer, HTTPStatus.OK)
        tokens, values = answer_of(answer)
        assert len(tokens) == LONG_REQUEST["max_tokens"]
        assert all(map(math.isfinite, values)), values
        if commits == self.oracle.commits and not self.oracle.lost:
            self._judge_answer("long", answer)

    @rule()
    @precondition(lambda self: self._serves_whole_weights)
    def compare_weights(self) -> None:
        found = self.bench.served_digests()
        self._count("weights compared", "200")
        expected = self.oracle.expected(self.bench.digests)
        differing = [name for name in expected if found.get(name) != expected[name]]
        assert found.keys() == expected.keys() and not differing, differing

    # What must hold.

    @invariant()
    def lives(self) -> None:
        assert self.server.process.poll() is None, "the server has ended"

    def teardown(self) -> None:
        try:
            if self.mapped is not None:
                self._heal()
        finally:
            self.clients.shutdown()
            self.held.close()

    def _heal(self) -> None:
        if self.waiting:
            self.wait_for_the_answer()
        self.start_over(A)
        self._send("chunk", sum(self.bench.tensors[A], []))
        self.finish()
        assert set(self.oracle.serving.values()) == {A}
        self.ask()
        self.compare_weights()
        ended = f"{self.policy.commit}, rollback {self.policy.rollback}"
        self._count("schedule", ended)

    @property
    def _serves_whole_weights(self) -> bool:
        if self.oracle.lost:
            return False
        return self.policy.serves_on or not self.oracle.received

    def _init(self) -> None:
        body = {"init_info": {"segment": self.bucket.name}}
        status = HTTPStatus.CONFLICT if self.oracle.is_open else HTTPStatus.OK
        self._do("init", "init_weight_transfer_engine", body, status)
        if status is HTTPStatus.OK:
            self.mapped = self.bucket.name

    def _tensors(self, number: int) -> list[Named]:
        return self.bench.tensors[self.oracle.seed][number]

    def _send(
        self,
        kind: str,
        tensors: list[Named],
        refusal: HTTPStatus | None = None,
        bad: Collection[str] = (),
    ) -> None:
        body = pack(tensors).write(self.bucket)
        if self.mapped != self.bucket.name:
            return self._send_refused(f"{kind}, other bucket mapped", body)
        with self._may_lose():
            answer = self.server.post("update_weights", body)
            # It may differ from what was sound, and is committed.
            late = bad and not self.policy.serves_on
            if refusal or (late and answer.status_code == UNPROCESSABLE):
                status = self.oracle.refused_chunk(UNPROCESSABLE)
            else:
                status = self.oracle.chunk(dict(tensors).keys() - set(bad), bad)
            self._judge(kind, answer, status)

    def _send_refused(self, kind: str, body: dict) -> None:
        with self._may_lose():
            status = self.oracle.refused_chunk(HTTPStatus.BAD_REQUEST)
            self._do(kind, "update_weights", body, status)

    def _train(
        self, bucket: SharedMemory, chunks: list[Packed], leaves: Leaves | None
    ) -> None:
        """Train from a process that is about to be killed."""
        body = {"init_info": {"segment": bucket.name}}
        assert self.server.post("init_weight_transfer_engine", body).ok
        assert self.server.post("start_weight_update", {}).ok
        *sent, last = chunks
        for chunk in sent:
            assert self.server.post("update_weights", chunk.write(bucket)).ok
        if leaves is not None:
            lose(self.server, "update_weights", last.write(bucket), leaves)

    @contextmanager
    def _may_lose(self) -> Iterator[None]:
        """Ask, if a sync ends in here without success, whether its layers are lost."""
        # Of a chunk that is refused a part may be committed.
        was_open, commits = self.oracle.is_open, self.oracle.commits
        yield
        ended = not self.oracle.is_open and commits == self.oracle.commits
        if was_open and ended and self.policy.loses_layers:
            self.oracle.lost = not self._health().ok

    def _health(self) -> requests.Response:
        return requests.get(f"{self.server.url}/health", timeout=60)

    def _do(self, kind: str, route: str, body: dict, expected: HTTPStatus) -> None:
        self._judge(kind, self.server.post(route, body), expected)

    def _judge(
        self, kind: str, answer: requests.Response, expected: HTTPStatus
    ) -> None:
        self._count(kind, str(answer.status_code))
        assert answer.status_code == expected, (kind, answer.status_code, answer.text)

    def _judge_refusal(self, answer: requests.Response) -> None:
        self._count("completion", "503")
        assert not self._serves_whole_weights
        assert not self.policy.serves_on
        for refused in (answer, self._health()):
            assert refused.status_code == HTTPStatus.SERVICE_UNAVAILABLE
            assert "weights" in refused.json()["error"]["message"]

    def _judge_answer(self, length: str, response: requests.Response) -> None:
        answer = answer_of(response)
        assert all(map(math.isfinite, answer[1])), answer
        beside = length == "long" or self.waiting
        if beside and torch.cpu._is_amx_tile_supported():
            return  # it rounds by what else runs; the weights are compared bit by bit
        key = (length, *sorted(self.oracle.serving.items()))
        assert self.bench.answers.setdefault(key, answer) == answer

    def _count(self, kind: str, outcome: str) -> None:
        self.bench.tally[kind, outcome] += 1
