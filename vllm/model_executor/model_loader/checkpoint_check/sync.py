# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What the command prints of a sync that was made."""

from collections.abc import Iterator, Sequence

from vllm.model_executor.model_loader.reload.sync_report import LayerReport, SyncReport

__all__ = ["sync_as_text"]

_COLUMNS = ("tensors", "planned", "MB", "receive, s", "check, s", "commit, s", "at, s")
_WIDTH = max(map(len, _COLUMNS))


def sync_as_text(report: SyncReport) -> str:
    """The whole sync in a line, why it failed, and a table of its layers."""
    lines = [f"{report.model}, rank {report.rank}: {report.summary}"]
    # The line has the first one.
    lines += report.reason.splitlines()[1:]
    if report.layers:
        lines += _table(report.layers)
    placed = sum(layer.planned + layer.through_loaders for layer in report.layers)
    if placed < report.tensors:
        lines.append(f"{report.tensors - placed:,} tensors were for no layer here")
    return "\n".join(lines)


def _table(layers: Sequence[LayerReport]) -> Iterator[str]:
    width = max(len("layer"), *(len(layer.name) for layer in layers))
    for name, *cells in (("layer", *_COLUMNS), *map(_cells, layers)):
        yield " ".join([name.ljust(width), *(cell.rjust(_WIDTH) for cell in cells)])


def _cells(layer: LayerReport) -> tuple[str, ...]:
    seconds = (
        layer.receiving_seconds,
        layer.checking_seconds,
        layer.committing_seconds,
    )
    at = layer.committed_at
    return (
        layer.name,
        str(layer.planned + layer.through_loaders),
        str(layer.planned),
        f"{layer.bytes / 1e6:.2f}",
        *(f"{value:.4f}" for value in seconds),
        "-" if at is None else f"{at:.2f}",
    )
