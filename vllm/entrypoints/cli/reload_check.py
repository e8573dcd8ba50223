# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The `reload-check` subcommand: is a checkpoint sound, and a sync to it?"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from vllm.entrypoints.cli.types import CLISubcommand

if TYPE_CHECKING:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

_DESCRIPTION = """
Look for what is wrong with a checkpoint, without a GPU and without an engine; or
read what VLLM_RELOAD_REPORT had a sync write.
Exit status: 0 sound, 1 something is wrong, 2 it cannot be read.
"""


class ReloadCheckSubcommand(CLISubcommand):
    """The `reload-check` subcommand of vLLM's command line."""

    name = "reload-check"

    @staticmethod
    def cmd(args: argparse.Namespace) -> None:
        """Print what is wrong, and exit with the status that says whether."""
        sys.exit(_run(args))

    def subparser_init(
        self, subparsers: argparse._SubParsersAction
    ) -> "FlexibleArgumentParser":
        """Declare the options."""
        parser = subparsers.add_parser(
            self.name, help="Check a checkpoint on disk.", description=_DESCRIPTION
        )
        what = parser.add_mutually_exclusive_group(required=True)
        what.add_argument(
            "checkpoint",
            nargs="?",
            help="a folder, or the id of a model that is on disk",
        )
        what.add_argument("--report", metavar="FILE", help="read the report of a sync")
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
    return _run(parser.parse_args())


def _run(args: argparse.Namespace) -> int:
    if args.report and args.against:
        unclear = "--against A: expected a checkpoint to compare with A, got a report"
        return _unreadable(ValueError(unclear), args.json)
    return _read(args) if args.report else _check(args)


def _read(args: argparse.Namespace) -> int:
    from vllm.model_executor.model_loader.checkpoint_check import sync_as_text
    from vllm.model_executor.model_loader.reload.sync_report import read_report

    try:
        report = read_report(args.report)
    except (OSError, ValueError) as error:
        return _unreadable(error, args.json)
    print(json.dumps(asdict(report)) if args.json else sync_as_text(report))
    return 0 if report.is_complete else 1


def _check(args: argparse.Namespace) -> int:
    from vllm.model_executor.model_loader import checkpoint_check as check

    try:
        checkpoint = check.open_checkpoint(args.checkpoint)
        before = check.open_checkpoint(args.against) if args.against else None
        report = check.check_checkpoint(checkpoint, _bar)
        sync = check.check_sync(before, checkpoint, _bar) if before else None
    except (check.UnreadableCheckpoint, OSError) as error:
        return _unreadable(error, args.json)
    if args.json:
        print(json.dumps(check.as_json(report, sync)))
    else:
        print(check.as_text(report, sync))
    return 0 if check.is_sound(report, sync) else 1


def _unreadable(error: Exception, as_json: bool) -> int:
    print(f"error: {error}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": str(error)}))
    return 2


def _bar(items: Sequence[Any], unit: str) -> Iterable[Any]:
    """Pass the items on and, on a terminal, show how many are left."""
    return tqdm(items, unit=f" {unit}", leave=False, disable=None)
