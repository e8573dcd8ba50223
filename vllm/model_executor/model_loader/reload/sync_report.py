# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a sync brought, how long that took and what it ended with.

Nothing is counted for each tensor that is sent. Ledgers and routes know what came;
`SyncTimes` notes a few times for each layer; the rest is put together at the end.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from time import perf_counter
from typing import Any

import torch.distributed as dist

from vllm.logger import init_logger

from .errors import WeightSyncError
from .staging import StagedLayer, StagedTensor

__all__ = [
    "Ending",
    "LayerReport",
    "LayersOfTensors",
    "SyncReport",
    "SyncTimes",
    "peak_staged_bytes",
    "publish",
    "read_report",
    "report_layers",
    "staged_bytes",
]

logger = init_logger(__name__)

# How many tensors went to each layer; None for those that went to none.
LayersOfTensors = Counter[str | None]
# When something was done: from, to.
Span = tuple[float, float]


class Stopwatch:
    """From when to when something was done to each layer."""

    def __init__(self) -> None:
        self._laps: list[tuple[float, float, Sequence[StagedLayer]]] = []

    @property
    def total(self) -> float:
        """Seconds spent on all layers."""
        return sum(end - start for start, end, _ in self._laps)

    @contextmanager
    def on(self, *layers: StagedLayer) -> Iterator[None]:
        """Note the time in this block, if there are any layers."""
        start = perf_counter()
        try:
            yield
        finally:
            if layers:
                self._laps.append((start, perf_counter(), layers))

    def spans(self) -> defaultdict[str, list[Span]]:
        """What was spent on each layer: of a block for several, by their bytes."""
        spans: defaultdict[str, list[Span]] = defaultdict(list)
        for start, end, layers in self._laps:
            sizes = [max(layer.nbytes, 1) for layer in layers]
            of_byte = (end - start) / sum(sizes)
            for layer, size in zip(layers, sizes):
                spans[layer.name].append((start, start + of_byte * size))
                start += of_byte * size
        return spans


class SyncTimes:
    """When a sync did what.

    Attributes:
        checking: time for scales, and what tells a tensor that comes again.
        committing: time for processing layers and putting them into service.
        started: when the sync began, as `time.perf_counter` has it.
        waiting: seconds between the calls of whoever sends the weights.
        written: when each tensor was written last.
        committed: when each layer began to serve.
        paused: since when no request can run; None while they can.

    """

    def __init__(self) -> None:
        self.checking = Stopwatch()
        self.committing = Stopwatch()
        self.started = perf_counter()
        self.waiting = 0.0
        self.written: dict[StagedTensor, float] = {}
        self.committed: dict[str, float] = {}
        self.paused: float | None = None
        self._left: float | None = None

    @property
    def seconds(self) -> float:
        """How long ago the sync began."""
        return perf_counter() - self.started

    @property
    def pause_seconds(self) -> float:
        """For how long no request could run until now."""
        return 0.0 if self.paused is None else perf_counter() - self.paused

    def pause(self) -> None:
        """From now to the end of the sync no request can run."""
        if self.paused is None:
            self.paused = perf_counter()

    def leave(self) -> None:
        """From now on the sync waits for a call."""
        self._left = perf_counter()

    @contextmanager
    def call(self) -> Iterator[None]:
        """A call of whoever sends the weights."""
        if self._left is not None:
            self.waiting += perf_counter() - self._left
        self._left = None
        try:
            yield
        finally:
            self.leave()

    def note_written(self, tensors: Iterable[StagedTensor]) -> None:
        """Note that these were written just now."""
        self.written.update(dict.fromkeys(tensors, perf_counter()))

    def note_committed(self, layer: str) -> None:
        """Note that a layer serves from now on."""
        self.committed[layer] = perf_counter()

    def receiving(self, layer: StagedLayer) -> list[Span]:
        """From the first write to the layer to the last, pauses included, if any."""
        own = [tensor for tensor in layer.owner_of if tensor in self.written]
        since = [tensor.since for tensor in own if tensor.since is not None]
        ends = [self.written[tensor] for tensor in own]
        return [(min(since), max(ends))] if since else []

    def since_start(self, spans: Iterable[Span]) -> list[list[float]]:
        """Spans as a report has them."""
        return [[a - self.started, b - self.started] for a, b in spans]


@dataclass(frozen=True)
class Ending:
    """How a sync ended. What was raised is not kept: it holds on to tensors.

    Attributes:
        result: see `SyncReport`.
        missing: how many parts of parameters it owed and did not bring.
        invalid: how many it brought that must not be served.

    """

    result: str = "complete"
    missing: int = 0
    invalid: int = 0

    @classmethod
    def of(cls, error: BaseException | None) -> Ending:
        """The end of a sync that is not complete; None was raised if it was aborted."""
        if error is None:
            return cls("aborted")
        if not isinstance(error, WeightSyncError):
            return cls("failed")
        result = "incomplete" if error.missing else "invalid"
        return cls(result, len(error.missing), len(error.invalid))


@dataclass(frozen=True)
class LayerReport:
    """What a sync did to one layer.

    Attributes:
        name: its qualified name.
        planned: tensors that came past the model, see `Route`.
        through_loaders: tensors that the layer's loaders were given.
        bytes: what was written of the layer on this rank, in checkpoint format.
        receiving_seconds: from the first write to the last, pauses included.
        checking_seconds: for scales, and what tells a tensor that comes again.
        committing_seconds: for processing it and putting it into service.
        committed_at: when it began to serve, in seconds from the start of the sync;
            None if it did not.
        received: from when to when it was written, in the same way, if it was.
        checked: from when to when it was checked, each time.
        processed: from when to when it was processed and put into service, each time.

    """

    name: str
    planned: int
    through_loaders: int
    bytes: int
    receiving_seconds: float
    checking_seconds: float
    committing_seconds: float
    committed_at: float | None
    received: Sequence[Sequence[float]] = field(default_factory=list)
    checked: Sequence[Sequence[float]] = field(default_factory=list)
    processed: Sequence[Sequence[float]] = field(default_factory=list)


@dataclass(frozen=True)
class SyncReport:
    """What a sync did on one rank.

    Attributes:
        model: class of the model.
        rank: this rank among all.
        result: "complete"; "incomplete" or "invalid" where what was sent is to blame;
            "aborted" by whoever sent it, or "failed" for another reason.
        reason: why it is not complete.
        state: what serves now, as in `ReloadStatus`.
        version: complete syncs so far.
        commit: when layers start to serve, "layer" or "model".
        planned: tensors that came past the model, see `Route`.
        through_loaders: tensors that loaders were given.
        bytes: what was written on this rank, in checkpoint format.
        seconds: from the start of the sync to its end.
        waiting_seconds: those of them between the calls of whoever sends the weights.
        checking_seconds: for scales, and what tells a tensor that comes again.
        committing_seconds: for processing layers and putting them into service.
        pause_seconds: from when no request can run to the end: from the call that
            finishes the sync, or the first committed layer if that is earlier.
        peak_staged_bytes: the most memory that was staged at a time.
        missing: how many parts of parameters it owed and did not bring.
        invalid: how many it brought that must not be served.
        layers: the layers that the sync brought anything for, in the model's order.
        checksums: of the tensors that serve, as they were sent, by checkpoint name, if
            VLLM_RELOAD_CHECKSUMS asks for them; see `checksums`.

    """

    model: str
    rank: int
    result: str
    reason: str
    state: str
    version: int
    commit: str
    planned: int
    through_loaders: int
    bytes: int
    seconds: float
    waiting_seconds: float
    checking_seconds: float
    committing_seconds: float
    pause_seconds: float
    peak_staged_bytes: int
    missing: int = 0
    invalid: int = 0
    layers: Sequence[LayerReport] = field(default=())
    checksums: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        """Whether what was sent serves."""
        return self.result == "complete"

    @property
    def tensors(self) -> int:
        """How many tensors were sent."""
        return self.planned + self.through_loaders

    @property
    def phase_seconds(self) -> dict[str, float]:
        """What the time was spent on: its parts add up to all of it."""
        apart = {
            "wait": self.waiting_seconds,
            "check": self.checking_seconds,
            "commit": self.committing_seconds,
        }
        return {"receive": self.seconds - sum(apart.values()), **apart}

    @property
    def summary(self) -> str:
        """One line on all of it."""
        end = f"{self.version} is complete" if self.is_complete else "failed"
        line = (
            f"Weight sync {end}: {self.tensors} tensors, {self.bytes / 1e6:.1f} MB in "
            f"{self.seconds:.2f} s ({self.waiting_seconds:.2f} s waiting, "
            f"{self.pause_seconds:.3f} s pause), "
            f"{self.bytes / self.seconds / 1e9:.2f} GB/s, {self.planned} planned, "
            f"{self.through_loaders} through loaders, at most "
            f"{self.peak_staged_bytes / 1e6:.1f} MB staged."
        )
        if self.is_complete:
            return line
        reason, _, _ = self.reason.partition("\n")
        return f"{line} Version {self.version} is {self.state}. It failed at {reason}"


def staged_bytes(tensors: Iterable[StagedTensor]) -> int:
    """What was written to staged tensors; what came twice counts twice."""
    return sum(t.ledger.written_numel * t.meta.element_size() for t in tensors)


def peak_staged_bytes(tensors: Iterable[StagedTensor]) -> int:
    """The most memory that staged tensors had at a time."""
    changes: list[tuple[float, int]] = []
    for tensor in tensors:
        if tensor.since is not None:
            until = float("inf") if tensor.until is None else tensor.until
            size = tensor.meta.nbytes
            changes += [(tensor.since, size), (until, -size)]
    held = peak = 0
    for _, change in sorted(changes):
        held += change
        peak = max(peak, held)
    return peak


def report_layers(
    layers: Iterable[StagedLayer],
    times: SyncTimes,
    planned: LayersOfTensors,
    loaded: LayersOfTensors,
) -> list[LayerReport]:
    """A row for each layer that a sync brought anything for.

    Args:
        layers: all layers, in the model's order.
        times: when what was done to them.
        planned: tensors that came past the model.
        loaded: tensors that loaders were given.

    """
    checked, processed = times.checking.spans(), times.committing.spans()
    rows = []
    for layer in layers:
        name, committed = layer.name, times.committed.get(layer.name)
        if not (layer.received or committed or planned[name] or loaded[name]):
            continue
        received = times.receiving(layer)
        row = LayerReport(
            name=name,
            planned=planned[name],
            through_loaders=loaded[name],
            bytes=staged_bytes(layer.owner_of),
            receiving_seconds=_seconds(received),
            checking_seconds=_seconds(checked[name]),
            committing_seconds=_seconds(processed[name]),
            committed_at=None if committed is None else committed - times.started,
            received=times.since_start(received),
            checked=times.since_start(checked[name]),
            processed=times.since_start(processed[name]),
        )
        rows.append(row)
    return rows


def _seconds(spans: Iterable[Span]) -> float:
    return sum(end - start for start, end in spans)


def publish(report: SyncReport, file: str | Path) -> None:
    """Write a report, in one step, in place of the one before.

    A report that cannot be written is a warning: it decides nothing about a sync.

    Args:
        report: the report.
        file: where to; with several ranks each one adds its number to the name.

    """
    path = Path(file)
    if dist.is_initialized() and dist.get_world_size() > 1:
        path = path.with_name(f"{path.stem}.rank{report.rank}{path.suffix}")
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        rows = [vars(row) for row in report.layers]
        aside.write_text(json.dumps({**vars(report), "layers": rows}))
        aside.replace(path)
    except OSError as error:
        logger.warning("The report of a weight sync cannot be written: %s", error)


def read_report(file: str | Path) -> SyncReport:
    """Read a report that `publish` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else.

    """
    try:
        content = json.loads(Path(file).read_text())
        rows = [_made_of(LayerReport, row) for row in content["layers"]]
        return _made_of(SyncReport, {**content, "layers": rows})
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} is no report of a weight sync, as VLLM_RELOAD_REPORT asks for: "
            f"{error}"
        ) from error


def _made_of(kind: type[Any], content: dict[str, Any]) -> Any:
    """A dataclass of a JSON object, which may have more fields than it has."""
    return kind(**{f.name: content[f.name] for f in fields(kind)})
