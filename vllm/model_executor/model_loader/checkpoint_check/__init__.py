# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Whether a checkpoint on disk may be served or synced, found out without a model."""

from .check import CheckpointReport, SyncReport, check_checkpoint, check_sync
from .checkpoint import UnreadableCheckpoint, open_checkpoint
from .report import as_json, as_text, is_sound
from .sync import sync_as_text

__all__ = [
    "CheckpointReport",
    "SyncReport",
    "UnreadableCheckpoint",
    "as_json",
    "as_text",
    "check_checkpoint",
    "check_sync",
    "is_sound",
    "open_checkpoint",
    "sync_as_text",
]
