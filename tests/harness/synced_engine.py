# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""An engine in a process of its own, to be synced and looked into.

    with start_engine(folder, "shm") as engine:
        before = engine.addresses()
        trainer.sync(seed, engine.post)
        assert engine.addresses() == before
        engine.answers()

The engine's core and its worker are in that process too, so parameters can be read.
"""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

__all__ = ["Answer", "GRAPHS", "SyncedEngine", "start_engine"]

# The first is longer than a block of the KV cache, so that its prefix is cached.
PROMPTS = ([3, 1, 4, 1, 5] * 30, [2, 7, 1, 8] * 5, [6, 6])
NEW_TOKENS = 16 if torch.cuda.is_available() else 4
TIMEOUT_SECONDS = 240
# How the model runs: each step in one CUDA graph, or as many as there are pieces
# between attention layers; no code is generated, which could differ between engines.
GRAPHS = {
    "eager": {},
    "full": {"mode": 0, "cudagraph_mode": "FULL"},
    "piecewise": {"mode": 3, "backend": "eager"},
}
VARIABLES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # Engines start beside each other, and on a busy machine threads wait long.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}
GPU_OPTIONS = dict(
    attention_backend="TRITON_ATTN",
    gpu_memory_utilization=0.1,
    # Engines start beside each other, so none can measure what is free.
    kv_cache_memory_bytes=1 << 28,
    enable_sleep_mode=True,
)


@dataclass(frozen=True)
class Answer:
    """What came of a prompt.

    Attributes:
        tokens: Those of the greedy answer.
        logprobs: Their log-probabilities.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Setup:
    """How an engine is made: its checkpoint, transfer backend and key of `GRAPHS`."""

    model: str
    backend: str
    graphs: str

    def options(self) -> dict[str, Any]:
        """Arguments of `LLM`."""
        options = dict(
            model=self.model,
            max_model_len=256,
            max_num_seqs=4,
            weight_transfer_config={"backend": self.backend},
        )
        if self.graphs == "eager":
            options["enforce_eager"] = True
        else:
            options["compilation_config"] = GRAPHS[self.graphs]
        return options | (GPU_OPTIONS if torch.cuda.is_available() else {})


class SyncedEngine:
    """The engine, seen from the test; the first call waits until it has started.

    A call that takes too long raises `TimeoutError`.
    """

    def __init__(self, process: ProcessPoolExecutor, setup: Setup):
        self._process, self._setup = process, setup
        self._started = self._submit("addresses")

    def post(self, route: str, body: dict[str, Any]) -> None:
        """Ask what a trainer asks of a server, by the same names.

        Raises:
            RuntimeError: The engine refuses.
        """
        self._call("post", route, body)

    def answers(self) -> tuple[Answer, ...]:
        """Answer each of `PROMPTS`.

        Raises:
            RuntimeError: The engine refuses.
        """
        return self._call("answers")

    def addresses(self) -> dict[str, int]:
        """Where each parameter and buffer is."""
        return self._call("addresses")

    def weights(self, folder: Path) -> dict[str, torch.Tensor]:
        """Copies of all parameters and buffers; a folder takes a file on the way."""
        file = folder / "weights.pt"
        self._call("save_weights", str(file))
        return torch.load(file)

    def captured_graphs(self) -> int:
        """How many CUDA graphs it has captured."""
        return self._call("captured_graphs")

    def sleep(self, level: int) -> None:
        self._call("sleep", level)

    def wake_up(self, *tags: str) -> None:
        self._call("wake_up", list(tags) or None)

    def _call(self, method: str, *args: Any) -> Any:
        self._started.result(TIMEOUT_SECONDS)  # or why it did not start
        return self._submit(method, *args).result(TIMEOUT_SECONDS)

    def _submit(self, method: str, *args: Any) -> Future:
        return self._process.submit(_run, self._setup, method, *args)


@contextmanager
def start_engine(model: Path, backend: str, graphs: str) -> Iterator[SyncedEngine]:
    """Start an engine; it is gone afterwards.

    Args:
        model: Folder of the checkpoint.
        backend: Of weight transfer.
        graphs: A key of `GRAPHS`.
    """
    spawn = multiprocessing.get_context("spawn")
    process = ProcessPoolExecutor(1, mp_context=spawn)
    identity = process.submit(os.getpid)
    try:
        yield SyncedEngine(process, Setup(str(model), backend, graphs))
    finally:
        os.kill(identity.result(), signal.SIGKILL)  # it may hang
        process.shutdown()


def _run(setup: Setup, method: str, *args: Any) -> Any:
    """Call a method of this process's engine.

    Raises:
        RuntimeError: It fails; another exception might not survive being pickled.
    """
    try:
        return getattr(_engine(setup), method)(*args)
    except Exception as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


@cache
def _engine(setup: Setup) -> "_Engine":
    os.environ.update(VARIABLES)
    torch.set_num_threads(1)
    return _Engine(setup.options())


class _Engine:
    """The engine, in its process."""

    def __init__(self, options: dict[str, Any]):
        from vllm import LLM  # which reads the variables

        self._llm = LLM(**options)
        self.sleep = self._llm.sleep
        self.wake_up = self._llm.wake_up

    def post(self, route: str, body: dict[str, Any]) -> None:
        self._llm.collective_rpc(route, kwargs=body)

    def answers(self) -> tuple[Answer, ...]:
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True, logprobs=1
        )
        prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        return tuple(_answer(output.outputs[0]) for output in outputs)

    def addresses(self) -> dict[str, int]:
        return {name: tensor.data_ptr() for name, tensor in self._tensors().items()}

    def save_weights(self, file: str) -> None:
        copies = {name: tensor.cpu() for name, tensor in self._tensors().items()}
        torch.save(copies, file)

    def captured_graphs(self) -> int:
        from vllm.compilation.counter import compilation_counter

        return compilation_counter.num_cudagraph_captured

    def _tensors(self) -> dict[str, torch.Tensor]:
        (tensors,) = self._llm.collective_rpc(_tensors_of)
        return tensors


def _tensors_of(worker: Any) -> dict[str, torch.Tensor]:
    model = worker.get_model()
    parameters = model.named_parameters(remove_duplicate=False)
    buffers = model.named_buffers(remove_duplicate=False)
    return {name: t.detach() for some in (parameters, buffers) for name, t in some}


def _answer(output: Any) -> Answer:
    tokens = tuple(output.token_ids)
    places = zip(output.logprobs, tokens, strict=True)
    return Answer(tokens, tuple(place[token].logprob for place, token in places))
