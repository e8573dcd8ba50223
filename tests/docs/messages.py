# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The messages that a module's source has for its errors, without running it."""

import ast
from collections.abc import Iterator
from pathlib import Path

__all__ = ["HOLE", "messages"]

# Stands for whatever a message fills in.
HOLE = "…"

# Which argument of a call says what is wrong.
_ARGUMENT = {
    "NotImplementedError": 0,
    "RankFailedError": 0,
    "RpcFailedError": 0,
    "RuntimeError": 0,
    "SyncConflictError": 0,
    "ValueError": 0,
    "WeightSyncError": 0,
    "Finding": 2,
    "Flaw": 0,
    "_refuse": 1,
    "describe": 4,
    "mark_inconsistent": 1,
    "refuse": 0,
}


def messages(file: Path) -> set[str]:
    """Return the messages of a module, `HOLE` where they are filled in.

    >>> WeightSyncError(f"{path} was cut short")
    "… was cut short"
    """
    found: set[str] = set()
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, functions):
            found |= set(_of_function(node))
    return {message for message in found if message.strip(f"{HOLE}: ")}


def _of_function(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    texts = dict(_assigned_texts(function))
    for node in ast.walk(function):
        match node:
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
                place = _ARGUMENT.get(name)
                if place is not None and place < len(node.args):
                    yield _text(node.args[place], texts)
            case ast.Assign(targets=[ast.Attribute(attr="lost")], value=value):
                yield _text(value, texts)  # why requests are refused


def _assigned_texts(function: ast.AST) -> Iterator[tuple[str, str]]:
    for node in ast.walk(function):
        match node:
            case ast.Assign(
                targets=[ast.Name(id=name)],
                value=ast.Constant(value=str()) | ast.JoinedStr() as value,
            ):
                yield name, _text(value, {})


def _text(node: ast.expr, texts: dict[str, str]) -> str:
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values):
            return "".join(_text(value, texts) for value in values)
        case ast.FormattedValue(value=value):
            return _text(value, texts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _text(left, texts) + _text(right, texts)
        case ast.Name(id=name):
            return texts.get(name, HOLE)
    return HOLE
