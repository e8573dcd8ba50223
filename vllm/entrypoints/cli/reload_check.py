# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The `reload-check` subcommand: is a checkpoint sound, and a sync to it?"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from vllm.entrypoints.cli.types import CLISubcommand

if TYPE_CHECKING:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

_DESCRIPTION = """
Look for what is wrong with a checkpoint, without a GPU and without an engine.
Exit status: 0 sound, 1 something is wrong, 2 it cannot be read.
"""


class ReloadCheckSubcommand(CLISubcommand):
    """The `reload-check` subcommand of vLLM's command line."""

    name = "reload-check"

    @staticmethod
    def cmd(args: argparse.Namespace) -> None:
        """Print what is wrong, and exit with the status that says whether."""
        sys.exit(_check(args))

    def subparser_init(
        self, subparsers: argparse._SubParsersAction
    ) -> "FlexibleArgumentParser":
        """Declare the options."""
        parser = subparsers.add_parser(
            self.name, help="Check a checkpoint on disk.", description=_DESCRIPTION
        )
        parser.add_argument(
            "checkpoint", help="a folder, or the id of a model that is on disk"
        )
        parser.add_argument(
            "--against", metavar="A", help="say what a sync from A would send"
        )
        parser.add_argument("--json", action="store_true", help="print a JSON object")
        return parser


def cmd_init() -> list[CLISubcommand]:
    """The subcommands of this module."""
    return [ReloadCheckSubcommand()]


def main() -> int:
    """Run this subcommand, and import nothing for the others; its exit status."""
    parser = argparse.ArgumentParser(prog="vllm")
    ReloadCheckSubcommand().subparser_init(parser.add_subparsers(required=True))
    return _check(parser.parse_args())


def _check(args: argparse.Namespace) -> int:
    from vllm.model_executor.model_loader import checkpoint_check as check

    try:
        checkpoint = check.open_checkpoint(args.checkpoint)
        before = check.open_checkpoint(args.against) if args.against else None
        report = check.check_checkpoint(checkpoint, _bar)
        sync = check.check_sync(before, checkpoint, _bar) if before else None
    except (check.UnreadableCheckpoint, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        if args.json:
            print(json.dumps({"error": str(error)}))
        return 2
    if args.json:
        print(json.dumps(check.as_json(report, sync)))
    else:
        print(check.as_text(report, sync))
    return 0 if check.is_sound(report, sync) else 1


def _bar(items: Sequence[Any], unit: str) -> Iterable[Any]:
    """Pass the items on and, on a terminal, show how many are left."""
    return tqdm(items, unit=f" {unit}", leave=False, disable=None)
