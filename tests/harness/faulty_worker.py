# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A worker to which things happen that a trainer has no part in."""

import os
import time
from collections.abc import Sequence

import pytest
import torch

import vllm.envs as envs
from vllm.model_executor.model_loader.reload import committer, meta
from vllm.model_executor.model_loader.reload.commit import Commit, apply_commits

__all__ = ["FaultyWorker"]

# More than any machine has.
TOO_MUCH = 1 << 50


class FaultyWorker:
    """A worker extension; `--worker-extension-cls tests.harness.faulty_worker...`."""

    _patch: pytest.MonkeyPatch | None = None
    _ran_out = False

    def choose_policy(self, commit: str, rollback: str) -> None:
        """Set the variables of the next sync, which are read but once by default."""
        os.environ["VLLM_RELOAD_COMMIT"] = commit
        os.environ["VLLM_RELOAD_ROLLBACK"] = rollback
        envs.disable_envs_cache()

    def process_id(self) -> dict[str, int]:
        """Return the process it lives in."""
        return {"process_id": os.getpid()}

    def limit_memory(self, tensors: int) -> None:
        """Let memory end once so many more tensors are staged.

        The error is the allocator's own: it is asked for more than there is.
        """
        left = [None] * int(tensors)
        allocate = meta.memory_of

        def limited(like: torch.Tensor, device: torch.device | None):
            if not left:
                self._ran_out = True
                return torch.empty(TOO_MUCH, dtype=torch.uint8, device=device)
            left.pop()
            return allocate(like, device)

        self._change(meta, "memory_of", limited)

    def commit_slowly(self, seconds: str) -> None:
        """Let each layer take its time to be committed."""

        def slow(commits: Sequence[Commit]) -> None:
            for commit in commits:
                print("a layer is being committed", flush=True)
                time.sleep(float(seconds))
                apply_commits([commit])

        self._change(committer, "apply_commits", slow)

    def behave(self) -> dict[str, bool]:
        """Be an ordinary worker again; tell whether its memory had run out."""
        if self._patch is not None:
            self._patch.undo()
        ran_out, self._patch, self._ran_out = self._ran_out, None, False
        return {"ran_out": ran_out}

    def _change(self, owner: object, name: str, value: object) -> None:
        self._patch = self._patch or pytest.MonkeyPatch()
        self._patch.setattr(owner, name, value)
