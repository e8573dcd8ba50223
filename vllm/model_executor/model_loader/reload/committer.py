# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Putting the layers of a sync into service: one by one, or all at its end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum

import torch

import vllm.envs as envs
from vllm.config import ModelConfig

from .as_staged import commit_as_staged, prepare_commit_of
from .bitwise import same_bytes
from .commit import Commit, Place, apply_commits
from .errors import Finding, WeightSyncError
from .model_reload import ModelReload
from .pristine import Shadow
from .processing import is_attention, pair_layer, process_layer, unservable
from .rollback import Rollback
from .staging import StagedLayer, StagedTensor, StagingMode, close
from .sync_report import SyncTimes

__all__ = ["CommitPolicy", "Committer"]


class CommitPolicy(Enum):
    """When staged layers start to serve.

    LAYER: each as soon as it is complete; extra memory for one layer. Whether the old
        weights serve after a failure is for a `Rollback`.
    MODEL: all of them at the end; extra memory for one model, and whatever fails, the
        old weights serve.
    """

    LAYER = "layer"
    MODEL = "model"

    @classmethod
    def from_environment(cls) -> CommitPolicy:
        """The policy that VLLM_RELOAD_COMMIT names.

        Raises:
            ValueError: it names no policy.

        """
        return cls(envs.VLLM_RELOAD_COMMIT)


class Committer:
    """Checks the layers of a sync, processes them and lets them serve.

        committer.commit(layers)                            # during the sync
        prepared = committer.finish(layers, model_config)   # at its end: the others
        committer.apply(prepared)                           # once all ranks agree

    Args:
        model: the model that serves.
        reload: what is known of its syncs.
        layers_of: the layers that hold each staged tensor.
        policy: when layers start to serve.
        rollback: keeps what committed layers held before, if that is wanted.
        mode: watches the staged tensors.
        times: when the sync did what.

    """

    def __init__(
        self,
        model: torch.nn.Module,
        reload: ModelReload,
        layers_of: Mapping[StagedTensor, Sequence[StagedLayer]],
        policy: CommitPolicy,
        rollback: Rollback | None,
        mode: StagingMode,
        times: SyncTimes,
    ):
        self._model = model
        self._reload = reload
        self._layers_of = layers_of
        self._policy = policy
        self._rollback = rollback
        self._mode = mode
        self._times = times
        self._claimed: dict[Place, torch.Tensor] = {}
        self._model_processed = False
        layers = {layer.layer for owners in layers_of.values() for layer in owners}
        attention = {layer for layer in layers if is_attention(layer)}
        children = {child for layer in attention for child in layer.children()}
        self._deferred = attention | children

    def may_commit(self, layer: StagedLayer) -> bool:
        """Whether a layer can be committed before the end of the sync."""
        if self._policy is CommitPolicy.MODEL or layer.committed:
            return False
        return layer.ready and layer.layer not in self._deferred

    def commit(self, layers: Sequence[StagedLayer]) -> None:
        """Commit those of these layers that may be served; the others stay open."""
        with self._mode.paused():
            good = self._servable(layers)
            as_staged = self._close(good)
            with self._times.committing.on(*as_staged):
                self._check_shared(as_staged.values())
            self._apply(as_staged)
            as_staged.clear()  # which holds staged memory
            for layer in good:
                if not layer.committed:
                    self._apply({layer: self._prepare(layer)})

    def unservable(self, layers: Sequence[StagedLayer]) -> list[Finding]:
        """What is staged of these layers and must not be served."""
        with self._times.checking.on(*layers), torch._C.DisableTorchFunction():
            return unservable(layers)

    def _servable(self, layers: Sequence[StagedLayer]) -> list[StagedLayer]:
        refused = {finding.layer for finding in self.unservable(layers)}
        return [layer for layer in layers if layer.name not in refused]

    def _close(self, layers: Sequence[StagedLayer]) -> dict[StagedLayer, Commit]:
        """Take no more writes to layers.

        Returns:
            The commits of those that serve their tensors as they are staged.

        """
        commits: dict[StagedLayer, Commit] = {}
        serving: dict[int, torch.Tensor] = {}
        known = () if self._reload.lost else layers
        with self._times.checking.on(*layers), torch._C.DisableTorchFunction():
            for layer in known:
                commit = commit_as_staged(layer)
                if commit is not None:
                    commits[layer] = commit
                    serving |= {id(new): live for live, new in commit.copies}
            close([tensor for layer in layers for tensor in layer.tensors], serving)
        return commits

    def finish(
        self, layers: Sequence[StagedLayer], model_config: ModelConfig | None
    ) -> list[tuple[StagedLayer, Commit]]:
        """Process the layers that are left, and commit those that need not wait.

        Returns:
            What is left to `apply`.

        """
        prepared: list[tuple[StagedLayer, Commit]] = []
        shadows: dict[StagedLayer, Shadow] = {}
        processed: dict[torch.nn.Module, torch.nn.Module] = {}
        with self._aside():
            for layer in sorted(layers, key=lambda layer: is_attention(layer.layer)):
                changed = {
                    name: processed[child]
                    for name, child in layer.layer.named_children()
                    if child in processed
                }
                renewed = bool(changed) or bool(self._reload.lost)
                derived = is_attention(layer.layer) and renewed
                if not (derived or (layer.changed and layer.complete)):
                    continue
                if layer.layer in self._deferred:
                    shadow = self._process(layer, model_config, changed)
                    shadows[layer], processed[layer.layer] = shadow, shadow.layer
                    continue
                commit = self._prepare(layer)
                if self._policy is CommitPolicy.LAYER:
                    self._apply({layer: commit})
                else:
                    prepared.append((layer, commit))
                    self._release(layer)
            # An attention layer may change what its children serve.
            for layer, shadow in shadows.items():
                prepared.append((layer, self._pair(layer, shadow)))
        return prepared

    def apply(self, prepared: Sequence[tuple[StagedLayer, Commit]]) -> None:
        """Let these layers serve, and the model as a whole."""
        self._apply({layer: commit for layer, commit in prepared if commit.as_staged})
        for layer, commit in prepared:
            if not layer.committed:
                self._apply({layer: commit})
        self._process_model()

    def drop(self, layer: StagedLayer) -> None:
        """Hide what is staged of a layer; drop its memory if nobody else commits it."""
        layer.hide()
        layer.info.reset()
        for tensor in layer.tensors:
            if all(owner.committed for owner in self._layers_of[tensor]):
                self._mode.forget(tensor)

    def roll_back(self, rollback: Rollback) -> None:
        """Let what served before this sync serve again."""
        with self._aside():
            rollback.restore()
        if self._model_processed:
            self._process_model()

    def forget_staged(self) -> None:
        """Hold no staged memory any more: nothing is committed from now on."""
        self._claimed.clear()

    def clear(self) -> None:
        """Hold no memory any more."""
        self.forget_staged()
        if self._rollback is not None:
            self._rollback.clear()

    def _prepare(self, layer: StagedLayer) -> Commit:
        """Return a layer's commit, once it is checked."""
        with self._times.committing.on(layer):
            with self._aside():
                commit = prepare_commit_of(layer, renew=bool(self._reload.lost))
            self._check_shared([commit])
        return commit

    def _process(
        self,
        layer: StagedLayer,
        model_config: ModelConfig | None,
        children: Mapping[str, torch.nn.Module],
    ) -> Shadow:
        renew = bool(self._reload.lost)
        with self._times.committing.on(layer):
            return process_layer(layer, model_config, children, renew)

    def _pair(self, layer: StagedLayer, shadow: Shadow) -> Commit:
        with self._times.committing.on(layer):
            commit = pair_layer(layer, shadow, renew=bool(self._reload.lost))
            self._check_shared([commit])
        return commit

    def _process_model(self) -> None:
        """Run the model's own hook, which a cold load runs after all layers."""
        hook = getattr(self._model, "process_weights_after_loading", None)
        if callable(hook) and not is_attention(self._model):
            self._model_processed = True
            hook()

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """For processing: no staging, no autograd, tensors that can be told changed."""
        with self._mode.paused(), torch.inference_mode(False), torch.no_grad():
            yield

    def _check_shared(self, commits: Iterable[Commit]) -> None:
        """Refuse to serve two different tensors from one memory.

        Loading ties an output projection to the embedding where a checkpoint repeats
        it; the next checkpoint may not.
        """
        with torch._C.DisableTorchFunction():
            for commit in commits:
                for place, (_, new) in zip(commit.targets, commit.copies):
                    other = self._claimed.get(place)
                    if other is not None and not same_bytes(other, new):
                        raise WeightSyncError(
                            f"weight sync sends {commit.layer} values that differ from "
                            "those of the layer whose memory it shares; load the "
                            "checkpoint anew"
                        )
                self._claim(commit, (new for _, new in commit.copies))

    def _claim(self, commit: Commit, values: Iterable[torch.Tensor]) -> None:
        """Note what is to serve from the memory that a commit copies to."""
        self._claimed.update(zip(commit.targets, values))

    def _apply(self, commits: Mapping[StagedLayer, Commit]) -> None:
        """Let layers serve what their commits bring."""
        if not commits:
            return
        if self._rollback is not None:
            for commit in commits.values():
                self._rollback.keep(commit)
        self._times.pause()
        for layer in commits:
            layer.committed = True  # from the first copy on
        with self._times.committing.on(*commits), torch._C.DisableTorchFunction():
            apply_commits([*commits.values()])
        for layer, commit in commits.items():
            # What was applied is in the live tensor, and not kept twice.
            self._claim(commit, (live for live, _ in commit.copies))
            self._times.note_committed(layer.name)
            self.drop(layer)

    def _release(self, layer: StagedLayer) -> None:
        """Drop the memory a layer is staged in, but for what its commit copies."""
        for tensor in layer.tensors:
            if not tensor.tied:
                self._mode.forget(tensor)
