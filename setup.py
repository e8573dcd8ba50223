# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The entry that upstream's users know; `pip install .` goes to `overlay.backend`."""

import argparse
import sys

from overlay.__main__ import main


def arguments() -> argparse.Namespace:
    """Parse the one command of setuptools that makes sense here."""
    parser = argparse.ArgumentParser(description="Build the fork's wheel.")
    parser.add_argument("command", choices=["bdist_wheel"])
    parser.add_argument("-d", "--dist-dir", default="dist")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main(["build", "--out", arguments().dist_dir]))
