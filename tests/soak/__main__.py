# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Run for long, and write a log.

    python -m tests.soak faults [--count 5000] --log FILE
    python -m tests.soak syncs [--count 200] --log FILE

Exit status: 0 if all went well.
"""

import argparse
import logging
import sys
import tempfile
from pathlib import Path

from tests.soak import faults, syncs

RUNS = {"faults": (faults.run, 5000), "syncs": (syncs.run, 200)}


def main() -> int:
    """Run what the command line asks for; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak")
    parser.add_argument("what", choices=RUNS)
    parser.add_argument("--count", type=int)
    parser.add_argument("--log", type=Path, required=True)
    args = parser.parse_args()
    run, count = RUNS[args.what]
    logger = _logger(args.log)
    with tempfile.TemporaryDirectory() as folder:
        return 0 if run(args.count or count, Path(folder), logger) else 1


def _logger(file: Path) -> logging.Logger:
    """Log to a file and the terminal."""
    logger = logging.getLogger("soak")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    # vLLM configures logging when it starts, which closes files: this one appends.
    file.unlink(missing_ok=True)
    for handler in (logging.FileHandler(file), logging.StreamHandler()):
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        logger.addHandler(handler)
    return logger


if __name__ == "__main__":
    sys.exit(main())
