# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""All that is to be said about a checkpoint, and about a sync to it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from vllm.model_executor.model_loader.reload.errors import Finding

from .blocks import block_size, check_blocks, check_config
from .checkpoint import Checkpoint
from .completeness import find_missing, find_surplus
from .difference import find_changes, find_unexpected, find_unsent
from .experts import find_experts, find_fused_experts, is_dead
from .pairs import find_lone, find_pairs
from .siblings import check_siblings
from .values import activation_scales, check_activation_scale, check_scale

__all__ = [
    "CheckpointReport",
    "SyncReport",
    "check_checkpoint",
    "check_sync",
    "first_of_each",
]

# Passes items on, and may show how far it is; the text says what with.
Progress = Callable[[Sequence[Any], str], Iterable[Any]]


@dataclass(frozen=True)
class CheckpointReport:
    """What was found in a checkpoint.

    Attributes:
        checkpoint: the checkpoint.
        pairs: how many weights have scales.
        experts: how many experts there are in all layers.
        dead: names of those that add nothing to their layer's output.
        missing: what is not stored and should be.
        invalid: what is stored and must not be served.

    """

    checkpoint: Checkpoint
    pairs: int
    experts: int
    dead: tuple[str, ...]
    missing: tuple[Finding, ...]
    invalid: tuple[Finding, ...]


@dataclass(frozen=True)
class SyncReport:
    """What a sync from one checkpoint to another would send.

    Attributes:
        before: the checkpoint that serves.
        unchanged: names of the tensors that are sent and are bitwise the same.
        missing: what the sync would owe and not bring.
        invalid: what it would bring and be refused for.

    """

    before: Checkpoint
    unchanged: tuple[str, ...]
    missing: tuple[Finding, ...]
    invalid: tuple[Finding, ...]


def check_checkpoint(checkpoint: Checkpoint, progress: Progress) -> CheckpointReport:
    """Look for all that is wrong with a checkpoint.

    Reads all scales. Reads of weights: those over which a scale is zero, and of each
    expert up to the first value that is not zero.

    Raises:
        UnreadableCheckpoint: a file became shorter meanwhile.
        OSError: a file cannot be read.

    """
    tensors = checkpoint.tensors
    pairs = find_pairs(tensors)
    own, fused = find_experts(tensors), find_fused_experts(tensors)
    block = block_size(checkpoint.quantization)
    experts = [*own, *fused]
    return CheckpointReport(
        checkpoint=checkpoint,
        pairs=len(pairs),
        experts=len(experts),
        dead=tuple(str(e) for e in progress(experts, "experts") if is_dead(e)),
        missing=first_of_each(find_lone(tensors), find_missing(checkpoint)),
        invalid=first_of_each(
            check_config(checkpoint),
            check_blocks(pairs, block) if block else (),
            check_siblings(own),
            find_surplus(experts, checkpoint),
            chain.from_iterable(map(check_scale, progress(pairs, "scales"))),
            chain.from_iterable(
                map(check_activation_scale, activation_scales(tensors))
            ),
        ),
    )


def check_sync(before: Checkpoint, after: Checkpoint, progress: Progress) -> SyncReport:
    """Look at what a sync from one checkpoint to another would send.

    Reads of each tensor, in both, up to the first 256 KiB that differ.

    Raises:
        UnreadableCheckpoint: a file became shorter meanwhile.
        OSError: a file cannot be read.

    """
    changes = find_changes(before, after)
    refusals = (change.refusal for change in changes)
    return SyncReport(
        before=before,
        unchanged=tuple(
            c.after.name for c in progress(changes, "tensors") if c.is_none
        ),
        missing=first_of_each(find_unsent(before, after)),
        invalid=first_of_each(find_unexpected(before, after), filter(None, refusals)),
    )


def first_of_each(*findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The first finding about each tensor: what else is wrong follows from it."""
    first: dict[tuple[str, int | None], Finding] = {}
    for finding in chain.from_iterable(findings):
        first.setdefault(
            (f"{finding.layer}.{finding.parameter}", finding.expert), finding
        )
    return tuple(first.values())
