# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A real engine meets a weight sync that fails half-way, and the next one."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

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


def serve(folder: Path) -> dict[str, Seen]:
    """Serve seed 1, fail to sync to seed 2, sync to it, and back."""
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

    def sync(*args) -> Seen:
        try:
            llm.collective_rpc(load, args=args)
        except Exception as error:
            return Seen(error=f"{type(error).__name__}: {error}")
        return Seen()

    return {
        "old": generate(),
        "old again": generate(),
        "failed sync": sync(2, OWED),
        "refused": generate(),
        "sync": sync(2),
        "new": generate(),
        "sync back": sync(1),
        "back": generate(),
    }


def test_requests_are_refused_from_a_failed_sync_to_a_complete_one(tmp_path):
    folder = write_checkpoint(CASE, seed=1, folder=tmp_path, tokenizer=True)
    # An engine leaves process groups and cached settings behind: it gets a process.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as process:
        seen = process.submit(serve, folder).result()

    assert seen["old again"].tokens == seen["old"].tokens
    assert seen["old again"].cached > 0
    assert seen["failed sync"].error.startswith("WeightSyncError: ")
    assert "layers.1.self_attn.qkv_proj" in seen["failed sync"].error
    assert seen["refused"].error.startswith("WeightsInconsistentError: ")
    assert "layers.1.self_attn.qkv_proj" in seen["refused"].error
    assert seen["sync"] == seen["sync back"] == Seen()
    assert seen["new"].cached == 0
    assert seen["new"].tokens not in ((), seen["old"].tokens)
    assert seen["back"] == seen["old"]
