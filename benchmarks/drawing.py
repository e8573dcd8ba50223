# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The command line of what draws a benchmark: a result, and the picture of it."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def draw_result(draw: Callable[[dict[str, Any], Path], None], summary: str) -> None:
    """Draw the result that the command line names into the picture that it names."""
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("result", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    draw(json.loads(options.result.read_text()), options.picture)
