# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The PEP 517 backend: what `pip install .` and `pip wheel .` call."""

from pathlib import Path
from typing import Any

from overlay.base import find_wheel
from overlay.fork import Fork
from overlay.wheel import build_wheel as build_fork_wheel


def build_wheel(
    wheel_directory: str,
    config_settings: dict[str, Any] | None = None,
    metadata_directory: str | None = None,
) -> str:
    """Build the fork's wheel from the base that the environment asks for.

    Args:
        wheel_directory: Where the wheel goes.
        config_settings: `{"base": "0.22.1"}` asks for another base than the default.
        metadata_directory: Unused; the metadata comes from the base.

    Returns:
        The wheel's file name.
    """
    wheel = find_wheel((config_settings or {}).get("base"))
    return build_fork_wheel(wheel, Fork.of(wheel.base), Path(wheel_directory)).name
