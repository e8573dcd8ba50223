# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The declared series: what belongs to which patch, and who imports whom."""

import ast
from collections.abc import Collection, Iterator
from pathlib import Path
from zipfile import ZipFile

import pytest

from overlay.base import CUDA, ROOT, Base, find_wheel
from overlay.edits import Edit, load_edits
from overlay.series import Patch, Series, SeriesError, checkout_files, load_series

SERIES = load_series(ROOT / "overlay" / "upstream.toml")


def patch_of(title: str, *entries: str) -> Patch:
    return Patch(title, "Why.", entries, {})


def test_each_file_has_a_patch_or_stays():
    SERIES.check(checkout_files(ROOT))


def test_a_file_in_no_entry_is_named():
    series = Series((patch_of("[Core] A", "vllm/a.py"),), ("tests/",))
    with pytest.raises(SeriesError, match=r"^vllm/b\.py: .*upstream\.toml"):
        series.check(["tests/test_a.py", "vllm/a.py", "vllm/b.py"])


def test_an_entry_without_a_file_is_named():
    series = Series((patch_of("[Core] A", "vllm/a.py", "vllm/b/"),), ())
    with pytest.raises(SeriesError, match=r"^vllm/b/: .*no such file"):
        series.check(["vllm/a.py"])


def test_the_longest_entry_decides():
    folder, file = patch_of("[Core] A", "vllm/a/"), patch_of("[Core] B", "vllm/a/b.py")
    series = Series((folder, file), ("vllm/a/c/",))
    assert series.owner("vllm/a/a.py") is folder
    assert series.owner("vllm/a/b.py") is file
    assert series.owner("vllm/a/c/b.py") is None


@pytest.mark.parametrize(
    ("declared", "match"),
    [
        ("stays = [", "upstream.toml: "),
        ("patch = []", "stays"),
        ('stays = ["a"]\n[[patch]]\ntitle = "A"\nbody = ""\nfiles = ["a"]', "once: a$"),
        ('stays = []\n[[patch]]\ntitle = "A"\nbody = ""\nfile = ["a"]', "'file'"),
    ],
    ids=["no TOML", "no stays", "twice", "unknown key"],
)
def test_a_malformed_series_is_refused(tmp_path, declared, match):
    file = tmp_path / "upstream.toml"
    file.write_text(declared)
    with pytest.raises(SeriesError, match=match):
        load_series(file)


@pytest.mark.parametrize("patch", SERIES.patches, ids=lambda patch: patch.title)
def test_a_message_is_in_upstreams_style(patch):
    area, _, subject = patch.title.partition("] ")
    assert area.startswith("[") and subject[0].isupper()
    assert len(patch.title) <= 72 and not patch.title.endswith(".")
    assert max(map(len, patch.body.splitlines())) <= 80
    assert "Signed-off-by" not in patch.body


@pytest.mark.parametrize("version", ["0.33.0"])
def test_no_patch_imports_what_a_later_one_brings(version):
    order = {patch.title: place for place, patch in enumerate(SERIES.patches)}
    patches = {module_of(path): owner for path, owner in brought()}
    edits = load_edits(ROOT / "overlay" / "edits", Base(CUDA, version))
    there_before = names_in_base(patches.keys())
    early = [
        f"{path} imports {module} of {patches[module].title}"
        for path, owner in brought()
        for name in imports(path, edits)
        if (module := module_with(name, patches.keys())) is not None
        if order[patches[module].title] > order[owner.title]
        if name not in there_before
    ]
    assert not early


def brought() -> Iterator[tuple[str, Patch]]:
    """Yield the files that patches bring, each with its patch."""
    for path in checkout_files(ROOT):
        if (owner := SERIES.owner(path)) is not None:
            yield path, owner


def module_of(path: str) -> str:
    """`vllm/a/__init__.py` and `vllm/a.py` are both `vllm.a`."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def module_with(name: str, modules: Collection[str]) -> str | None:
    """The one of these modules that an imported name is, or is in.

    A package that has the module is there before: upstream's, or with its first module.
    """
    parent = name.rpartition(".")[0]
    return next((module for module in (name, parent) if module in modules), None)


def names_in_base(modules: Collection[str]) -> set[str]:
    """What those of the modules that upstream has too define there: they are replaced.

    The base is the one of this environment; what 0.33 has of them is the same.
    """
    names: set[str] = set()
    with ZipFile(find_wheel().path) as wheel:
        for module in modules:
            path = f"{module.replace('.', '/')}.py"
            if path in wheel.NameToInfo:
                names |= {f"{module}.{n}" for n in defined(wheel.read(path).decode())}
    return names


def defined(code: str) -> Iterator[str]:
    """Yield the names that a module defines at its top."""
    for node in ast.parse(code).body:
        match node:
            case ast.FunctionDef(name) | ast.ClassDef(name):
                yield name
            case ast.Assign([ast.Name(name)]) | ast.AnnAssign(ast.Name(name)):
                yield name


def imports(path: str, edits: tuple[Edit, ...]) -> set[str]:
    """Return the names that a file, or the code of a file of edits, imports."""
    if path.endswith(".py"):
        tree = ast.parse((ROOT / path).read_text())
        is_package = path.endswith("/__init__.py")
        package = module_of(path) if is_package else module_of(str(Path(path).parent))
        return set(imported(tree, package))
    found: set[str] = set()
    for edit in edits:
        if path == f"overlay/edits/{edit.file}":
            package = module_of(str(Path(edit.module).parent))
            found |= {edit.to.replace(":", ".")}
            found |= set(imported(ast.parse(edit.code.strip()), package))
    return found


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Yield what import statements name, and strings that name a module of vLLM."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module, names, level):
                parents = package.split(".")[: len(package.split(".")) - level + 1]
                origin = ".".join([*parents, module] if module else parents)
                origin = origin if level else module or ""
                yield from (f"{origin}.{alias.name}" for alias in names)
            case ast.Constant(str(text)) if text.startswith("vllm."):
                yield text


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import vllm.b.c", {"vllm.b.c"}),
        ("from vllm.b import c", {"vllm.b.c"}),
        ("from . import c", {"vllm.a.c"}),
        ("from .b import c", {"vllm.a.b.c"}),
        ("from ..b import c", {"vllm.b.c"}),
        ("def f():\n    import vllm.b", {"vllm.b"}),
        ("register('vllm.b')", {"vllm.b"}),
    ],
)
def test_every_kind_of_import_counts(code, expected):
    assert set(imported(ast.parse(code), "vllm.a")) == expected


@pytest.mark.parametrize(
    ("name", "module"),
    [("a.b", "a.b"), ("a.b.c", "a.b"), ("a.c", "a"), ("b.c", None)],
)
def test_a_name_of_a_module_is_that_modules(name, module):
    assert module_with(name, ["a", "a.b"]) == module


def test_definitions_at_the_top_are_found():
    code = "A = 1\nB: int = 2\ndef f():\n    C = 3\nclass D:\n    def g(self): ..."
    assert set(defined(code)) == {"A", "B", "f", "D"}
