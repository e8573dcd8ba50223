# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A real engine meets a weight sync that fails half-way, and the next one."""

from pathlib import Path

import pytest

from tests.checkpoints import CASES, write_checkpoint
from vllm import LLM, SamplingParams
from vllm.model_executor.model_loader.reload import WeightSyncError
from vllm.v1.engine.refused_output import WeightsInconsistentError

CASE = CASES["llama-bf16"]
PROMPT = {"prompt_token_ids": [3, 1, 4, 1, 5] * 8}
GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)


def load(worker, seed: int, without: str = "") -> None:
    """Sync a worker to the checkpoint of a seed, leaving out a tensor."""
    tensors = (item for item in CASE.tensors(seed) if item[0] != without)
    worker.reload_weights(weights_iterator=tensors)


def generate(llm: LLM):
    (output,) = llm.generate([PROMPT], GREEDY, use_tqdm=False)
    return output


@pytest.fixture
def llm(tmp_path: Path, monkeypatch) -> LLM:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    folder = write_checkpoint(CASE, seed=1, folder=tmp_path)
    return LLM(str(folder), skip_tokenizer_init=True, enforce_eager=True)


# An engine leaves process groups and cached settings behind.
@pytest.mark.forked
def test_a_failed_sync_is_refused_until_a_complete_one(llm):
    old = generate(llm).outputs[0].token_ids
    assert generate(llm).num_cached_tokens > 0

    with pytest.raises(WeightSyncError, match="k_proj"):
        llm.collective_rpc(load, args=(2, "model.layers.1.self_attn.k_proj.weight"))
    with pytest.raises(WeightsInconsistentError, match="k_proj"):
        generate(llm)

    llm.collective_rpc(load, args=(2,))
    new = generate(llm)
    assert new.num_cached_tokens == 0
    assert new.outputs[0].token_ids != old

    llm.collective_rpc(load, args=(1,))
    assert generate(llm).outputs[0].token_ids == old
