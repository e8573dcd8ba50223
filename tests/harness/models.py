# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Build a real vLLM model in this process, without an engine."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.checkpoints import Case
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.model_loader import get_model
from vllm.model_executor.models import ModelRegistry


class Built(NamedTuple):
    """A model that serves, and the configuration it was built with."""

    model: torch.nn.Module
    vllm_config: VllmConfig

    @contextmanager
    def worker_context(self) -> Iterator[None]:
        """The context in which a worker loads and syncs weights."""
        device = next(self.model.parameters()).device
        with set_current_vllm_config(self.vllm_config), device:
            yield


@contextmanager
def single_rank() -> Iterator[None]:
    """Be the one rank of the distributed groups that every vLLM layer asks for."""
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, "tcp://127.0.0.1:0", 0, "gloo")
        initialize_model_parallel(1, 1)
    # A load collects garbage twice, mostly to visit the modules that are here for good.
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        destroy_model_parallel()
        destroy_distributed_environment()


def build(case: Case, folder: Path, **arguments) -> Built:
    """Load the checkpoint in `folder`, as a worker's model loader does.

    Args:
        case: What the checkpoint holds.
        folder: Where `write_checkpoint` put it.
        arguments: More arguments of `EngineArgs`, such as `load_format="dummy"`.
    """
    with pytest.MonkeyPatch.context() as patch:
        _register_eagerly(patch, case.architecture.name)
        # Models of one process share their rotary embeddings, which a reload moves.
        patch.setattr(rotary_embedding, "_ROPE_DICT", {})
        vllm_config = _engine_args(case, folder, arguments).create_engine_config()
        with set_current_vllm_config(vllm_config):
            return Built(get_model(vllm_config=vllm_config), vllm_config)


def _engine_args(case: Case, folder: Path, arguments: dict) -> EngineArgs:
    defaults = dict(
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=256,
        kv_cache_dtype=case.kv_cache_dtype,
    )
    return EngineArgs(model=str(folder), **(defaults | arguments))


def _register_eagerly(patch: pytest.MonkeyPatch, architecture: str) -> None:
    """Import a model's class here, where vLLM would start a process to inspect it."""
    lazy = ModelRegistry.models[architecture]
    patch.setitem(ModelRegistry.models, architecture, lazy)
    ModelRegistry.register_model(architecture, lazy.load_model_cls())
