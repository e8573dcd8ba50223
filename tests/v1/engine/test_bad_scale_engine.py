# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A real engine meets a bad scale in weights that serve.

On a GPU a kernel records it. On a CPU none does, so the tests write what one would.
"""

import json
import math
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import regex as re
import torch

from tests.checkpoints import CASES, write_checkpoint

CASE = CASES["qwen3_moe-fp8_block"]
PROMPT = {"prompt_token_ids": [3, 1, 4, 1, 5] * 4}
NAMED = re.compile(
    r"layers\.1\.mlp\.experts.*w13_weight_scale_inv "
    r"expert \d up: scale is nan, must be finite and positive"
)
ON_GPU = torch.cuda.is_available()
# The first product of a layer in a launch of its own, or with the activation in it.
TABLES = {"": {}, "gated": {"BLOCK_SIZE_N": 256, "SLICES_N": 2}}


@dataclass(frozen=True)
class Seen:
    """What came of a request: tokens, and why it ended."""

    tokens: tuple[int, ...] = ()
    ended: str = ""


@torch.inference_mode()
def plant(worker, tensor: str) -> None:
    """Let each expert have a NaN, and a kernel have met that of expert 2."""
    from vllm.model_executor.layers.fused_moe.scale_watch import (
        BLOCK_N_SHIFT,
        EXPERT_SHIFT,
        SLOT_SHIFT,
        scale_watch,
    )

    (scale,) = (
        parameter
        for name, parameter in worker.get_model().named_parameters()
        if "layers.1." in name and name.endswith(tensor)
    )
    block_n, block_k = scale.shape[1] - 1, scale.shape[2] - 1
    scale.data[:, block_n, block_k] = math.nan
    if scale.is_cuda:
        return
    watch = scale_watch(worker.device)
    slot = watch.slot(scale) << SLOT_SHIFT
    word = slot | 2 << EXPERT_SHIFT | block_n << BLOCK_N_SHIFT | block_k
    watch.device_word.fill_(word)
    watch.host_word.fill_(word)


def load(worker) -> None:
    worker.reload_weights(weights_iterator=CASE.tensors(1))


def write_table(name: str, folder: Path) -> None:
    """Tune the layers of this checkpoint, on this GPU."""
    from vllm.model_executor.layers.fused_moe.fused_moe import get_config_file_name

    tile = dict(BLOCK_SIZE_M=16, BLOCK_SIZE_N=128, BLOCK_SIZE_K=128, GROUP_SIZE_M=1)
    second = dict(BLOCK_SIZE_N=128, SLICES_N=1)
    sizes = CASE.sizes.experts, CASE.sizes.intermediate
    table = folder / get_config_file_name(*sizes, "fp8_w8a8", [128, 128])
    table.write_text(json.dumps({"1": tile | TABLES[name] | {"SECOND": second}}))
    os.environ["VLLM_TUNED_CONFIG_FOLDER"] = str(folder)


def serve(
    folder: Path, check: str, batches: int, table: str, tensor: str
) -> dict[str, Seen]:
    """Plant a bad scale while two requests run; the next step is the last of one.

    With two batches in flight each request is in one of its own, as with pipelines.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    os.environ["VLLM_MOE_SCALE_CHECK"] = check
    from vllm import LLM, SamplingParams
    from vllm.config import VllmConfig

    options: dict[str, Any] = dict(enforce_eager=True, max_model_len=128)
    if ON_GPU:
        write_table(table, folder)
        options |= dict(attention_backend="TRITON_ATTN", gpu_memory_utilization=0.2)
        options["async_scheduling"] = batches > 1
    else:  # which has no asynchronous scheduling
        VllmConfig.max_concurrent_batches = batches
    llm = LLM(str(folder), **options)
    core = llm.llm_engine.engine_core.engine_core
    assert (core.batch_queue is not None) == (batches > 1)

    def ask(name: str, max_tokens: int) -> None:
        params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        llm.llm_engine.add_request(name, PROMPT, params)

    def finish() -> dict[str, Seen]:
        seen = {}
        while llm.llm_engine.has_unfinished_requests():
            for output in llm.llm_engine.step():
                (answer,) = output.outputs
                ended = str(answer.stop_reason or answer.finish_reason)
                seen[output.request_id] = Seen(tuple(answer.token_ids), ended)
        return seen

    ask("before", 6)
    seen = finish()
    for name, max_tokens in (("last", 3), ("long", 6)):
        ask(name, max_tokens)
        llm.llm_engine.step()
    assert batches == 1 or core.batch_queue
    llm.collective_rpc(plant, args=(tensor,))
    seen |= finish()
    ask("next", 6)
    seen |= finish()
    llm.collective_rpc(load)
    ask("after", 6)
    return seen | finish()


def in_a_process(*args) -> dict[str, Seen]:
    # An engine leaves process groups and cached settings behind: it gets a process.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as process:
        return process.submit(serve, *args).result()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    return write_checkpoint(CASE, seed=1, folder=folder, tokenizer=True)


@pytest.mark.parametrize("table", TABLES if ON_GPU else [""])
@pytest.mark.parametrize("batches", [1, 2])
def test_a_bad_scale_ends_requests_until_a_complete_sync(folder, batches, table):
    seen = in_a_process(folder, "raise", batches, table, "w13_weight_scale_inv")
    assert seen["before"].ended == "length"
    for name in ("last", "long", "next"):
        assert NAMED.search(seen[name].ended), seen[name]
        tokens = seen[name].tokens
        assert tokens == seen["before"].tokens[: len(tokens)]
    assert not seen["next"].tokens
    assert seen["after"] == seen["before"]


@pytest.mark.parametrize("table", TABLES if ON_GPU else [""])
def test_nobody_looks_when_checks_are_off(folder, table):
    # In w13 a GPU's quantisation of activations would make numbers of what is NaN.
    seen = in_a_process(folder, "off", 1, table, "w2_weight_scale_inv")
    assert all(request.ended == "length" for request in seen.values())
    assert seen["next"].tokens == (0,) * 6
