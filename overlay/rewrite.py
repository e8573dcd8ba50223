# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Applying edits to the text of a module, by its syntax tree.

Whatever an edit does not touch keeps its formatting to the last blank.
"""

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import libcst as cst

from overlay.base import Base
from overlay.edits import Edit

Definition = cst.FunctionDef | cst.ClassDef
Statement = cst.SimpleStatementLine | cst.BaseCompoundStatement


class Misfit(Exception):
    """An edit found its module, but cannot be applied there."""


class Action(cst.CSTTransformer):
    """One edit at work on one module."""

    def __init__(self, edit: Edit) -> None:
        super().__init__()
        self.edit = edit
        self.found = 0

    def apply(self, module: cst.Module) -> cst.Module:
        """Return the edited module.

        Raises:
            Misfit: The anchor is missing or ambiguous, or cannot take the edit.
        """
        changed = module.visit(self)
        if self.found != 1:
            raise Misfit(f"anchor found {self.found} times, expected once")
        return changed

    def statements(self) -> list[Statement]:
        """Parse the edit's own lines, comments above the first one included."""
        code = cst.parse_module(textwrap.dedent(self.edit.code).strip("\n") + "\n")
        if not code.body:
            raise Misfit("`code` is empty")
        first, *rest = code.body
        lines = [*code.header, *first.leading_lines]
        return [first.with_changes(leading_lines=lines), *rest]


class AtDefinition(Action):
    """An action whose anchor is a function, a method or a class."""

    def __init__(self, edit: Edit) -> None:
        super().__init__(edit)
        self._scope: list[str] = []

    def change(self, node: Definition) -> cst.CSTNode | cst.FlattenSentinel:
        """Return what takes the anchor's place."""
        raise NotImplementedError

    def visit_FunctionDef(self, node: cst.FunctionDef) -> None:
        self._scope.append(node.name.value)

    def visit_ClassDef(self, node: cst.ClassDef) -> None:
        self._scope.append(node.name.value)

    def leave_FunctionDef(self, original_node: Any, updated_node: Any) -> Any:
        return self._leave(updated_node)

    def leave_ClassDef(self, original_node: Any, updated_node: Any) -> Any:
        return self._leave(updated_node)

    def _leave(self, node: Definition) -> Any:
        name = ".".join(self._scope)
        self._scope.pop()
        return self.matched(node) if name == self.edit.anchor else node

    def matched(self, node: Any) -> Any:
        """Count the anchor and change it."""
        self.found += 1
        return self.change(node)


class AtStart(AtDefinition):
    """Lines that a function runs first, after its docstring.

    Of several edits at one function, the last declared runs first.
    """

    def change(self, node: Definition) -> cst.CSTNode:
        body = _indented(node.body)
        start = _count_docstring(body.body)
        lines = [*body.body[:start], *self.statements(), *body.body[start:]]
        return node.with_changes(body=body.with_changes(body=lines))


class AtEnd(AtDefinition):
    """Lines appended to the body of a class, or of the module."""

    def apply(self, module: cst.Module) -> cst.Module:
        if self.edit.anchor:
            return super().apply(module)
        return module.with_changes(body=[*module.body, *_spaced(self.statements())])

    def change(self, node: Definition) -> cst.CSTNode:
        if not isinstance(node, cst.ClassDef):
            raise Misfit("anchor is a function, expected a class")
        body = _indented(node.body)
        lines = [*body.body, *_spaced(self.statements())]
        return node.with_changes(body=body.with_changes(body=lines))


class AfterImport(Action):
    """Lines after the last import at the top of the module."""

    def apply(self, module: cst.Module) -> cst.Module:
        if self.edit.anchor:
            raise Misfit("takes no anchor")
        place = _count_docstring(module.body)
        for index, statement in enumerate(module.body):
            if isinstance(statement, Definition):
                break
            if _is_import(statement):
                place = index + 1
        lines = [*module.body[:place], *self.statements(), *module.body[place:]]
        return module.with_changes(body=lines)


class Decorate(AtDefinition):
    """A decorator, innermost, so that whatever registers the function sees it too."""

    def change(self, node: Definition) -> cst.CSTNode:
        expression = cst.parse_expression(self.edit.code.strip().removeprefix("@"))
        decorators = [*node.decorators, cst.Decorator(expression)]
        return node.with_changes(decorators=decorators)


class Beside(AtDefinition):
    """An action whose anchor may also be the assignment to a name."""

    def leave_SimpleStatementLine(self, original_node: Any, updated_node: Any) -> Any:
        scope, _, name = self.edit.anchor.rpartition(".")
        here = ".".join(self._scope) == scope
        return (
            self.matched(updated_node)
            if here and name in _assigned(updated_node)
            else updated_node
        )


class Before(Beside):
    """Lines before a definition or an assignment."""

    def change(self, node: Any) -> cst.FlattenSentinel:
        return cst.FlattenSentinel([*_spaced(self.statements()), node])


class After(Beside):
    """Lines after a definition or an assignment."""

    def change(self, node: Any) -> cst.FlattenSentinel:
        return cst.FlattenSentinel([node, *_spaced(self.statements())])


class Redirect(Action):
    """A name imported from elsewhere, wherever the module imports it.

    The anchor is the name as this module binds it.
    """

    def apply(self, module: cst.Module) -> cst.Module:
        changed = module.visit(self)
        if not self.found:
            raise Misfit("no import binds this name")
        return changed

    def leave_SimpleStatementLine(self, original_node: Any, updated_node: Any) -> Any:
        statement = updated_node.body[0]
        if not isinstance(statement, cst.Import | cst.ImportFrom):
            return updated_node
        if isinstance(statement.names, cst.ImportStar):
            return updated_node
        kept = [a for a in statement.names if _binding(a) != self.edit.anchor]
        if len(kept) == len(statement.names):
            return updated_node
        self.found += 1
        if not kept:
            body = [*self._import().body, *updated_node.body[1:]]
            return updated_node.with_changes(body=body)
        kept[-1] = kept[-1].with_changes(comma=statement.names[-1].comma)
        rest = statement.with_changes(names=kept)
        line = updated_node.with_changes(body=[rest, *updated_node.body[1:]])
        return cst.FlattenSentinel([line, self._import()])

    def _import(self) -> cst.SimpleStatementLine:
        origin, _, name = self.edit.to.partition(":")
        if not (origin and name):
            raise Misfit(f"`to` is {self.edit.to!r}, expected package.module:name")
        alias = "" if name == self.edit.anchor else f" as {self.edit.anchor}"
        line = cst.parse_statement(f"from {origin} import {name}{alias}")
        return cst.ensure_type(line, cst.SimpleStatementLine)


ACTIONS: dict[str, type[Action]] = {
    "at_start": AtStart,
    "at_end": AtEnd,
    "after_import": AfterImport,
    "decorate": Decorate,
    "before": Before,
    "after": After,
    "redirect": Redirect,
}


def rewrite(text: str, edits: Iterable[Edit], base: Base) -> str:
    """Apply edits, in order, to the text of the one module that they name.

    Raises:
        EditError: An edit's action is unknown, its anchor is missing or its code does
            not parse; the message names module, anchor, base and declaring file.
    """
    module = cst.parse_module(text)
    for edit in edits:
        module = _apply(edit, module, base)
    return module.code


def _apply(edit: Edit, module: cst.Module, base: Base) -> cst.Module:
    if edit.action not in ACTIONS:
        raise edit.misfit(f"unknown action; there are {', '.join(ACTIONS)}", base)
    try:
        changed = ACTIONS[edit.action](edit).apply(module)
        compile(changed.code, edit.module, "exec", dont_inherit=True)
    except (Misfit, cst.ParserSyntaxError, SyntaxError) as error:
        raise edit.misfit(str(error), base) from error
    return changed


def _indented(body: cst.BaseSuite) -> cst.IndentedBlock:
    """Return a body as a block; `def f(): return 1` has it on the same line."""
    if isinstance(body, cst.SimpleStatementSuite):
        return cst.IndentedBlock([cst.SimpleStatementLine(body.body)])
    return cst.ensure_type(body, cst.IndentedBlock)


def _count_docstring(body: Sequence[cst.BaseStatement]) -> int:
    """Return 1 if the body starts with a docstring, else 0."""
    match body:
        case [cst.SimpleStatementLine([cst.Expr(cst.SimpleString())]), *_]:
            return 1
    return 0


def _spaced(statements: list[Statement]) -> list[Statement]:
    """Put an empty line above the first statement."""
    first, *rest = statements
    lines = [cst.EmptyLine(indent=False), *first.leading_lines]
    return [first.with_changes(leading_lines=lines), *rest]


def _is_import(statement: Statement) -> bool:
    if not isinstance(statement, cst.SimpleStatementLine):
        return False
    return isinstance(statement.body[0], cst.Import | cst.ImportFrom)


def _assigned(line: cst.SimpleStatementLine) -> set[str]:
    """Return the plain names that a statement line assigns to."""
    targets: list[cst.BaseExpression] = []
    for statement in line.body:
        if isinstance(statement, cst.Assign):
            targets += [target.target for target in statement.targets]
        if isinstance(statement, cst.AnnAssign):
            targets.append(statement.target)
    return {target.value for target in targets if isinstance(target, cst.Name)}


def _binding(alias: cst.ImportAlias) -> str:
    return alias.evaluated_alias or alias.evaluated_name
