# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What the command prints."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import regex as re

from vllm.model_executor.model_loader.reload import WeightSyncError
from vllm.model_executor.model_loader.reload.errors import Finding

from .blocks import block_size
from .check import CheckpointReport, SyncReport, first_of_each
from .checkpoint import Checkpoint

__all__ = ["as_json", "as_text", "is_sound"]

_MAX_NAMES = 5


def is_sound(report: CheckpointReport, sync: SyncReport | None) -> bool:
    """Whether nothing is wrong with the checkpoint, nor with the sync to it."""
    return not any(_findings(report, sync))


def as_text(report: CheckpointReport, sync: SyncReport | None) -> str:
    """A few lines on what is there, then at most 20 on what is wrong."""
    missing, invalid = _findings(report, sync)
    if not missing and not invalid:
        return "\n".join([*_summary(report, sync), "sound"])
    count = len(missing) + len(invalid)
    error = WeightSyncError(f"not sound: {count} findings", missing, invalid)
    return "\n".join([*_summary(report, sync), str(error)])


def as_json(report: CheckpointReport, sync: SyncReport | None) -> dict[str, object]:
    """All that was found, as what `json.dumps` takes."""
    missing, invalid = _findings(report, sync)
    content: dict[str, object] = {
        "sound": is_sound(report, sync),
        **_size(report.checkpoint),
        "weights_with_scales": report.pairs,
        "experts": report.experts,
        "dead_experts": report.dead,
        "missing": [asdict(finding) for finding in missing],
        "invalid": [asdict(finding) for finding in invalid],
    }
    if sync is not None:
        content["against"] = {**_size(sync.before), "unchanged": sync.unchanged}
    return content


def _findings(
    report: CheckpointReport, sync: SyncReport | None
) -> tuple[tuple[Finding, ...], tuple[Finding, ...]]:
    """What is missing and what is invalid."""
    if sync is None:
        return report.missing, report.invalid
    missing = first_of_each(report.missing, sync.missing)
    return missing, first_of_each(report.invalid, sync.invalid)


def _size(checkpoint: Checkpoint) -> dict[str, object]:
    return {
        "checkpoint": str(checkpoint.folder),
        "tensors": len(checkpoint.tensors),
        "bytes": checkpoint.nbytes,
    }


def _summary(report: CheckpointReport, sync: SyncReport | None) -> Iterator[str]:
    checkpoint = report.checkpoint
    block = block_size(checkpoint.quantization)
    blocks = f", in blocks of {block[0]} x {block[1]}" if block else ""
    size = f"{len(checkpoint.tensors):,} tensors, {checkpoint.nbytes:,} bytes"
    yield f"{checkpoint.folder}: {size}"
    yield f"  {report.pairs:,} weights with scales{blocks}"
    dead = f"{len(report.dead):,} dead{_listing(report.dead)}"
    yield f"  {report.experts:,} experts, {dead}"
    if sync is not None:
        alike = Counter(re.sub(r"\b\d+\b", "*", name) for name in sync.unchanged)
        kinds = [f"{name} ({count})" for name, count in alike.most_common()]
        yield f"a sync from {sync.before.folder} sends {size}"
        yield f"  {len(sync.unchanged):,} unchanged{_listing(kinds)}"


def _listing(names: Sequence[str]) -> str:
    """The first few, after a colon if there are any."""
    shown = [*names[:_MAX_NAMES], *(["..."] if len(names) > _MAX_NAMES else [])]
    return f": {', '.join(shown)}" if shown else ""
