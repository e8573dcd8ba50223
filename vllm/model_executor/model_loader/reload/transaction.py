# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""One sync of new weights into a model that serves: all of it, or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import vllm.envs as envs
from vllm.config import ModelConfig
from vllm.logger import init_logger

from .agreement import agree_across_ranks
from .checksums import SentChecksums
from .commit import Commit
from .committer import CommitPolicy, Committer
from .copying import Copies, batch_launcher
from .errors import WeightSyncError
from .first_plan import first_routes
from .idle_calls import IdleCalls
from .kept import KeptTensors
from .model_reload import ModelReload
from .placement import expert_placements
from .plan import Plan, fingerprint, loaded_by
from .planned import PlannedCopies
from .reach import SyncReach
from .ready_layers import ReadyLayers
from .registry import get_layerwise_info
from .rollback import Rollback
from .route import Route
from .routing import RouteRecorder
from .source import Source, Weights
from .staging import StagedLayer, StagedLoader, StagedTensor, StagingMode
from .staging_area import stage_model
from .stream_order import StreamOrder
from .sync_report import (
    Ending,
    SyncReport,
    SyncTimes,
    peak_staged_bytes,
    publish,
    report_layers,
    staged_bytes,
)
from .unknown_experts import unknown_experts

__all__ = ["ReloadTransaction"]

logger = init_logger(__name__)

# These say all there is to say, or are not about the tensor that was being loaded.
_UNEXPLAINED = (WeightSyncError, MemoryError, torch.OutOfMemoryError)


class ReloadTransaction:
    """A sync from its first tensor to its commit.

        transaction = ReloadTransaction(model, reload, CommitPolicy.LAYER)
        transaction.open()
        for chunk in chunks:
            model.load_weights(chunk)       # is transaction.load_weights meanwhile
        transaction.prepare(model_config)   # if others have a say in it
        transaction.finish(model_config)    # or transaction.abort(reason)

    The layers show their staged tensors during `load_weights` only, so that a model
    serves its old weights between chunks. A model without `load_weights`, or a caller
    that drives the parameters' loaders itself, sees them until the layer is committed.

    Args:
        model: the model to load into.
        reload: what is known of its syncs.
        policy: when layers start to serve.
        exposed: whether to show the staged tensors from start to end.
        rollback: keeps what committed layers held before; without it, a sync that fails
            after the first of them leaves a mixture.

    """

    def __init__(
        self,
        model: torch.nn.Module,
        reload: ModelReload,
        policy: CommitPolicy,
        exposed: bool = False,
        rollback: Rollback | None = None,
    ):
        self._times = SyncTimes()
        self._model = model
        self._reload = reload
        self._policy = policy
        self._rollback = rollback
        self._load_weights: Any = getattr(model, "load_weights", None)
        # Somebody may have put one of their own before that of the class.
        self._own_load_weights = vars(model).get("load_weights")
        self._exposed = exposed or self._load_weights is None
        modules = dict(model.named_modules())
        placements = expert_placements(modules)
        self._layers = stage_model(
            modules, reload.first_loaded, self._run_loader, placements
        )
        self._layers_of: dict[StagedTensor, list[StagedLayer]] = {}
        for layer in self._layers:
            for tensor in layer.tensors:
                self._layers_of.setdefault(tensor, []).append(layer)
        self._order = StreamOrder.on(tensor.device for tensor in self._layers_of)
        self._recorder = RouteRecorder()
        self._kept = KeptTensors()
        self._checksums = SentChecksums() if envs.VLLM_RELOAD_CHECKSUMS else None
        self._mode = StagingMode(self._layers_of, self._recorder)
        self._idle = IdleCalls(self._recorder, self._mode)
        ways = policy, rollback, self._mode, self._times
        self._committer = Committer(model, reload, self._layers_of, *ways)
        metas = [tensor.meta for tensor in self._layers_of]
        self._layout = fingerprint(modules, metas, placements.values())
        # What the first load wrote says nothing of experts that have moved since, nor
        # of what another function does.
        as_loaded = get_layerwise_info(model).loaded_by == loaded_by(model)
        is_first = reload.first_loaded and reload.plan.layout is None
        if is_first and as_loaded and not placements:
            reload.plan.take_over(first_routes(self._layers_of), self._layout)
            for tensor in self._layers_of:
                tensor.first_load.forget_routes()
        self._ready = ReadyLayers(self._layers)
        self._planned = self._planned_copies(reload.plan)
        self._loaded: set[str] = set()  # names of parameters
        self._loading = False
        self._prepared: list[tuple[StagedLayer, Commit]] | None = None
        self._failure: str | None = None
        self._ending = Ending()

    def _planned_copies(self, plan: Plan) -> PlannedCopies:
        tensors = list(self._layers_of)
        routes = plan.routes_for(self._layout) if envs.VLLM_RELOAD_PLAN else {}
        # Experts that have moved owe the same boxes, and have no routes.
        owed = {t.key: t.ledger.numbers for t in tensors}
        table = plan.table_for(owed) if routes else None
        devices = {tensor.device for tensor in tensors}
        copies = Copies(batch_launcher(devices.pop()) if len(devices) == 1 else None)
        touch, limit = self._mode.touch, self._ready.limit
        return PlannedCopies(routes, tensors, touch, copies, table, limit)

    @property
    def is_open(self) -> bool:
        """Whether weights may still be loaded."""
        return self._failure is None and self._reload.transaction is self

    @property
    def mixture(self) -> str:
        """How much of the model serves new weights already; empty if nothing does."""
        committed = sum(layer.committed for layer in self._layers)
        total = len(self._layers)
        return f"{committed} of {total} layers are committed" if committed else ""

    @property
    def sent(self) -> int:
        """How many tensors came so far, also those that went nowhere."""
        return self._planned.taken + self._recorder.count

    @property
    def routes(self) -> dict[str, Route]:
        """Where tensors go past the model, by checkpoint name."""
        return self._planned.routes

    def open(self) -> None:
        """Take the model's `load_weights`, or show the staged tensors."""
        self._reload.transaction = self
        for layer in self._layers:
            layer.info.staged = layer
            if self._exposed:
                layer.show()
        if self._load_weights is not None:
            vars(self._model)["load_weights"] = self.load_weights
        self._times.leave()

    def load_weights(self, weights: Weights, *args: Any, **kwargs: Any) -> Any:
        """Stage one chunk through the model's own `load_weights`.

        When it returns, nothing refers to the chunk's tensors any more.

        Returns:
            What the model's own returns. To names of parameters those are added that
            this sync brought past the model.

        Raises:
            WeightSyncError: the sync was aborted before, or a tensor was refused; the
                sync is then aborted.
            Exception: whatever iterating over `weights` raises, unchanged; the sync is
                then aborted.

        """
        with self._times.call(), self._order.call():
            return self._load(weights, args, kwargs)

    def _load(self, weights: Weights, args: tuple, kwargs: dict[str, Any]) -> Any:
        self._check_open()
        self._check_loading()
        watched = self._recorder, self._planned, self.commit_ready_layers, self._kept
        if self._checksums is not None:
            weights = self._checksums.watch(weights)
        source = Source(weights, *watched)
        try:
            is_left = source.skip_planned()
            load = partial(self._load_by_model, source, *args, **kwargs)
            result = load() if is_left or args or kwargs else self._idle.run(load)
            self.commit_ready_layers()
        except BaseException as error:
            reason = f"loading {source.name or 'weights'}: {error!r}"
            refused = isinstance(error, Exception) and error is not source.error
            if refused and not isinstance(error, _UNEXPLAINED):
                refusal = source.explain(error)
                self.fail(reason, refusal)
                raise refusal from error
            self.fail(reason, error)
            raise
        finally:
            self._recorder.end()
        if isinstance(result, set):
            result |= self._loaded
        return result

    def _load_by_model(self, source: Source, *args: Any, **kwargs: Any) -> Any:
        with self._staging():
            result = self._load_weights(iter(source), *args, **kwargs)
        self._kept.settle(self._recorder.nowhere)
        self._check_experts()
        return result

    def prepare(self, model_config: ModelConfig | None) -> None:
        """Do all of `finish` that can be refused, and take no more tensors.

        The old weights serve until `finish`, if nothing was committed before.

        Raises:
            WeightSyncError: as for `finish`.

        """
        with self._times.call(), self._order.call(), self._aborting():
            self._prepare(model_config)

    def finish(self, model_config: ModelConfig | None) -> None:
        """Commit what is staged, if the sync brought all that it owes.

        Raises:
            WeightSyncError: the sync was aborted before, is incomplete or brought
                invalid scales.

        """
        with self._times.call(), self._order.call():
            with self._aborting():
                self._committer.apply(self._prepare(model_config))
            self._succeed()

    def _prepare(
        self, model_config: ModelConfig | None
    ) -> list[tuple[StagedLayer, Commit]]:
        """What is left to apply, once all ranks have come so far."""
        self._times.pause()
        with agree_across_ranks():
            self._check_open()
            if self._prepared is None:
                self._check_complete()
                self._prepared = self._committer.finish(self._left(), model_config)
        return self._prepared

    @contextmanager
    def _aborting(self) -> Iterator[None]:
        """Abort the sync if this block fails."""
        try:
            yield
        except BaseException as error:
            self.abort(str(error) or repr(error), error)
            raise

    def fail(self, reason: str, error: BaseException | None = None) -> None:
        """Drop what is staged, and refuse what is loaded until the sync is closed.

        Layers that were committed are rolled back, or else the model is fenced.

        Args:
            reason: why.
            error: what was raised, if anything was.

        """
        if self._failure is not None:
            self._forget_staged()  # what came since, within a call
            return
        self._failure, self._ending = reason, Ending.of(error)
        mixture = self.mixture
        lost, fenced = self._reload.lost, self._reload.fenced
        if mixture:
            self._reload.fenced = True
            self._reload.lost = (
                f"a weight sync failed when {mixture}; complete a sync to serve "
                f"again. It failed at {reason}"
            )
        for layer in self._layers:
            self._committer.drop(layer)
        self._forget_staged()
        if mixture and self._rollback is not None and self._restored(self._rollback):
            self._reload.lost, self._reload.fenced = lost, fenced
            logger.warning("A weight sync failed when %s: rolled back.", mixture)
        self._report()

    def _forget_staged(self) -> None:
        for tensor in self._layers_of:
            self._mode.forget(tensor)
        self._committer.forget_staged()
        self._kept.drop()

    def abort(self, reason: str, error: BaseException | None = None) -> None:
        """Drop what is staged, and close; see `fail`."""
        with self._order.call():
            self.fail(reason, error)
            self._end()

    def _succeed(self) -> None:
        # Of a part nobody knows what its loaders keep for the rest.
        if all(tensor.ledger.complete for tensor in self._layers_of):
            self._reload.plan.take_over(self._recorder.routes(), self._layout)
            self._reload.unchecked = ""
        if not self._reload.first_loaded:
            for tensor in self._layers_of:
                tensor.learn()
        if self._checksums is not None:
            kept = self._reload.checksums if self._checksums.are_all else {}
            self._reload.checksums = kept | self._checksums.as_text()
        self._reload.version += 1
        self._reload.first_loaded = True
        self._reload.lost, self._reload.fenced = "", False
        self._reload.reach = SyncReach.of(self._layers_of)
        for layer in self._layers:
            if not layer.committed:
                self._committer.drop(layer)
        self._end()
        self._report()

    def _report(self) -> None:
        """Tell how the sync ended: a line in the log, and a file if one is named."""
        # Or each look at a staged tensor costs more than counting what it holds.
        with torch._C.DisableTorchFunction():
            report = self._summarize()
            self._reload.ended.append(report)
            log = logger.info if self._failure is None else logger.warning
            log("%s", report.summary)
            if envs.VLLM_RELOAD_REPORT:
                counts = self._planned.layers, self._recorder.layers
                rows = report_layers(self._layers, self._times, *counts)
                sums = self._reload.checksums
                whole = replace(report, layers=rows, checksums=sums)
                publish(whole, envs.VLLM_RELOAD_REPORT)

    def _summarize(self) -> SyncReport:
        return SyncReport(
            model=type(self._model).__name__,
            rank=dist.get_rank() if dist.is_initialized() else 0,
            result=self._ending.result,
            reason=self._failure or "",
            state=self._reload.status.state,
            version=self._reload.version,
            commit=self._policy.value,
            planned=self._planned.taken,
            through_loaders=self._recorder.count,
            bytes=staged_bytes(self._layers_of),
            seconds=self._times.seconds,
            waiting_seconds=self._times.waiting,
            checking_seconds=self._times.checking.total,
            committing_seconds=self._times.committing.total,
            pause_seconds=self._times.pause_seconds,
            peak_staged_bytes=peak_staged_bytes(self._layers_of),
            missing=self._ending.missing,
            invalid=self._ending.invalid,
        )

    def _restored(self, rollback: Rollback) -> bool:
        """Let what served before this sync serve again; tell whether that worked."""
        try:
            self._committer.roll_back(rollback)
        except Exception as error:
            logger.exception("The old weights could not be put back.")
            self._reload.lost += f". The old weights could not be put back: {error!r}"
            return False
        for layer in self._layers:
            layer.committed = False
        self._times.committed.clear()
        return True

    def _end(self) -> None:
        self._prepared = None
        self._committer.clear()  # whoever still holds this holds no staged memory
        if self._reload.transaction is self:
            vars(self._model).pop("load_weights", None)
            if self._own_load_weights is not None:
                vars(self._model)["load_weights"] = self._own_load_weights
            self._reload.transaction = None

    def _check_open(self) -> None:
        if self._failure is not None:
            summary = "this weight sync was aborted, start another one"
            raise WeightSyncError(f"{summary}: {self._failure}")
        if self._reload.transaction is not self:
            raise WeightSyncError("no weight sync is open, start one first")

    def _check_loading(self) -> None:
        if self._prepared is not None:
            raise WeightSyncError(
                "this weight sync is prepared to finish and takes no more tensors; "
                "finish or abort it, then start another one"
            )

    def _check_experts(self) -> None:
        unknown = unknown_experts(self._model, self._recorder.nowhere)
        self._recorder.nowhere.clear()
        if unknown:
            raise WeightSyncError("weight sync refused tensors", invalid=unknown)

    def _check_complete(self) -> None:
        owes_all = bool(self._reload.lost)
        layers = [layer for layer in self._layers if not layer.committed]
        owed = [
            layer
            for layer in layers
            if owes_all or layer.received or layer.shares_changed_matrix
        ]
        missing = [finding for layer in owed for finding in layer.missing()]
        missing += self._kept.waiting()
        # What is neither owed nor complete is not committed.
        changed = [x for x in layers if x.changed and (x.complete or x in owed)]
        invalid = self._committer.unservable(changed)
        if missing or invalid:
            what = "incomplete" if missing else "invalid"
            raise WeightSyncError(f"weight sync is {what}", missing, invalid)

    @contextmanager
    def _staging(self) -> Iterator[None]:
        """Show the staged tensors and watch what is done to them."""
        if self._loading:
            with nullcontext() if self._watches else self._mode:
                yield
            return
        self._loading = True
        for layer in self._layers:
            layer.show()
        try:
            with self._mode:
                yield
        finally:
            self._loading = False
            for layer in self._layers:
                if layer.committed or not self._exposed:
                    layer.hide()

    @property
    def _watches(self) -> bool:
        """Whether the mode does: not while a caller's iterator runs."""
        return self._mode in _get_current_dispatch_mode_stack()

    def _run_loader(self, loader: StagedLoader, args: tuple, kwargs: dict) -> Any:
        if self._loading and not self._watches:
            with self._mode, self._recorder.direct():
                return self._run_loader(loader, args, kwargs)
        if self._loading:
            result = loader.load(args, kwargs)
            self.commit_ready_layers()
            return result
        self._check_open()
        self._check_loading()
        self._recorder.layers[loader.tensor.layer] += 1
        if self._checksums is not None:
            self._checksums.are_all = False
        with self._times.call(), self._order.call():
            try:
                with self._staging(), self._recorder.direct():
                    result = self._run_loader(loader, args, kwargs)
                    self._commit_now(self._ready.take())
                    return result
            except BaseException as error:
                place = f"{loader.tensor.layer}.{loader.tensor.name}"
                self.fail(f"loading {place}: {error!r}", error)
                raise

    def commit_ready_layers(self) -> None:
        """Commit what was just completed, as soon as it is worth it.

        A layer that is complete and must not be served stays open: what is wrong may
        be sent again, and is an error at finish.

        Raises:
            WeightSyncError: the sync was aborted or prepared from within a call, by
                whoever sends.

        """
        self._check_open()
        self._check_loading()
        touched = self._mode.take_touched()
        if touched:
            self._times.note_written(touched)
            self._loaded.update(tensor.path for tensor in touched)
        for layer in {layer: None for t in touched for layer in self._layers_of[t]}:
            if self._committer.may_commit(layer):
                self._ready.add(layer)
        if self._ready.are_enough:
            self._commit_now(self._ready.take())

    def _commit_now(self, layers: list[StagedLayer]) -> None:
        if not layers:
            return
        self._planned.copies.flush()
        shown = [layer for layer in layers if layer.is_shown]
        for layer in layers:
            layer.hide()
        self._committer.commit(layers)
        for layer in shown:
            if self._loading or not layer.committed:
                layer.show()

    def _left(self) -> list[StagedLayer]:
        """The layers that are not committed, hidden."""
        left = [layer for layer in self._layers if not layer.committed]
        for layer in left:
            layer.hide()
        return left
