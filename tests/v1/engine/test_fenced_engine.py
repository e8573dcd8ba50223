# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A real engine meets a weight sync that fails half-way, and the next one."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.checkpoints import CASES, write_checkpoint

CASE = CASES["llama-bf16"]
OWED = "model.layers.1.self_attn.k_proj.weight"

# Longer than a block of the KV cache, so that its prefix is cached.
PROMPT = {"prompt_token_ids": [3, 1, 4, 1, 5] * 40}


@dataclass(frozen=True)
class Seen:
    """What came of a request: tokens, or the name and the text of an error."""

    tokens: tuple[int, ...] = ()
    cached: int = 0
    error: str = ""


def load(worker, seed: int, without: str = "") -> None:
    """Sync a worker to the checkpoint of a seed, leaving out a tensor."""
    tensors = (item for item in CASE.tensors(seed) if item[0] != without)
    worker.reload_weights(weights_iterator=tensors)


def load_half(worker, seed: int) -> None:
    """Leave a sync open of which some layers are committed."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

    model = worker.model_runner.get_model()
    tensors = list(CASE.tensors(seed))
    with set_current_vllm_config(worker.vllm_config):
        initialize_layerwise_reload(model)
        model.load_weights(tensors[: len(tensors) // 2])


def abort(worker) -> None:
    from vllm.model_executor.model_loader.reload import abort_layerwise_reload

    abort_layerwise_reload(worker.model_runner.get_model(), "the user gave up")


def serve(folder: Path, rollback: str) -> dict[str, Seen]:
    """Serve seed 1, give up a sync to seed 2, fail in one, sync to it, and back."""
    os.environ["VLLM_RELOAD_ROLLBACK"] = rollback
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    from vllm import LLM, SamplingParams

    llm = LLM(str(folder), enforce_eager=True)
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)

    def generate() -> Seen:
        try:
            (output,) = llm.generate([PROMPT], params, use_tqdm=False)
        except Exception as error:
            return Seen(error=f"{type(error).__name__}: {error}")
        return Seen(tuple(output.outputs[0].token_ids), output.num_cached_tokens)

    def sync(*args, how=load) -> Seen:
        try:
            llm.collective_rpc(how, args=args)
        except Exception as error:
            return Seen(error=f"{type(error).__name__}: {error}")
        return Seen()

    return {
        "old": generate(),
        "old again": generate(),
        "half a sync": sync(2, how=load_half),
        "meanwhile": generate(),
        "aborted": sync(how=abort),
        "after the abort": generate(),
        "failed sync": sync(2, OWED),
        "after the failure": generate(),
        "sync": sync(2),
        "new": generate(),
        "sync back": sync(1),
        "back": generate(),
    }


@pytest.fixture(params=["off", "host"])
def rollback(request) -> str:
    return request.param


def test_a_failed_sync_and_a_complete_one(rollback, tmp_path):
    """Requests are refused from one to the other, unless it is rolled back."""
    folder = write_checkpoint(CASE, seed=1, folder=tmp_path, tokenizer=True)
    # An engine leaves process groups and cached settings behind: it gets a process.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as process:
        seen = process.submit(serve, folder, rollback).result()

    assert seen["old again"].tokens == seen["old"].tokens
    assert seen["old again"].cached > 0
    assert seen["half a sync"] == seen["aborted"] == Seen()
    assert "a weight sync is under way" in seen["meanwhile"].error
    assert seen["failed sync"].error.startswith("WeightSyncError: ")
    assert "layers.1.self_attn.qkv_proj" in seen["failed sync"].error
    if rollback == "host":
        assert seen["after the abort"] == seen["old again"]
        assert seen["after the failure"] == seen["old again"]
    else:
        refusal = "WeightsInconsistentError: "
        assert seen["after the abort"].error.startswith(refusal)
        assert "the user gave up" in seen["after the abort"].error
        assert seen["after the failure"].error.startswith(refusal)
        assert "layers.1.self_attn.qkv_proj" in seen["after the failure"].error
    assert seen["sync"] == seen["sync back"] == Seen()
    assert seen["new"].cached == 0
    assert seen["new"].tokens not in ((), seen["old"].tokens)
    assert seen["back"] == seen["old"]
