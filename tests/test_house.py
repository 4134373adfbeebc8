"""The rules of the house that a machine can check. None of them needs a model."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import mixofshow
from mixofshow import errors
from tests.mutations import MUTATIONS, Mutation

SOURCE = Path(mixofshow.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
LONGEST_MODULE = 400
LONGEST_FUNCTION = 50

Function = ast.FunctionDef | ast.AsyncFunctionDef

FORBIDDEN_IMPORTS = {"pickle", "dill", "cloudpickle", "marshal", "shelve"}
FORBIDDEN_BUILTINS = {"eval", "exec"}  # the method `model.eval()` is another thing
FORBIDDEN_METHODS = {"extractall"}
FORBIDDEN_CALLS = {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system"}


def label(path: Path) -> str:
    """A source file's name, as pytest shows it."""
    return path.relative_to(SOURCE).as_posix()


def module_name(path: Path) -> str:
    """`mixofshow.concepts.words` for its file."""
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


every_file = pytest.mark.parametrize("path", FILES, ids=label)


@every_file
def test_modules_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_MODULE


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda one: f"{one.file}: {one.old.strip()}")
def test_every_mutation_has_its_place(mutation: Mutation) -> None:
    """So that the night's run, which makes them, does not stop at code that has changed."""
    assert (SOURCE / mutation.file).read_text(encoding="utf-8").count(mutation.old) == 1
    assert (Path(__file__).parent / mutation.tests.partition("::")[0]).is_file()


@every_file
def test_functions_are_short(path: Path) -> None:
    functions = [node for node in ast.walk(parse(path)) if isinstance(node, Function)]
    lengths = {f"{node.name}, line {node.lineno}": (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION} == {}


@every_file
def test_what_is_public_says_what_it_is(path: Path) -> None:
    silent = [f"{node.name}, line {node.lineno}" for node in public(parse(path)) if not ast.get_docstring(node)]
    assert silent == []


@every_file
def test_nothing_goes_past_the_output_that_forgives(path: Path) -> None:
    """typer writes UTF-8 of its own into an output that is ASCII."""
    assert "typer.echo(" not in path.read_text(encoding="utf-8")


@every_file
def test_strangers_bytes_are_never_run(path: Path) -> None:
    assert dangers(parse(path)) == []


@pytest.mark.parametrize(
    "code",
    [
        "eval('1')",
        "exec('1')",
        "import pickle",
        "from pickle import loads",
        "import pickle as p",
        "yaml.load(text)",
        "from yaml import load",
        "archive.extractall()",
        "subprocess.run('ls', shell=True)",
        "os.system('ls')",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "from torch import load",
        "torch.load(path, weights_only=flag)",
        "numpy.load(path, allow_pickle=True)",
    ],
)
def test_the_search_for_dangers_finds_them(code: str) -> None:
    assert dangers(ast.parse(code))


@pytest.mark.parametrize(
    "code", ["model.eval()", "yaml.safe_load(text)", "torch.load(path, weights_only=True)", "subprocess.run(['ls'])"]
)
def test_the_search_for_dangers_leaves_the_rest_alone(code: str) -> None:
    assert dangers(ast.parse(code)) == []


def test_the_tree_of_errors_is_drawn_whole() -> None:
    classes = {
        name: cls.__base__.__name__
        for name, cls in inspect.getmembers(errors, inspect.isclass)
        if issubclass(cls, errors.MixOfShowError)
    }
    assert drawn_tree(errors.__doc__ or "") == classes


def test_every_folder_of_modules_is_a_package() -> None:
    # A folder without __init__.py can be imported, but import-linter and walkers of packages do not see it.
    assert [label(folder) for folder in {path.parent for path in FILES} if not (folder / "__init__.py").exists()] == []


NAMED_TWICE = {
    "__init__": "what makes a folder a package",
    "__main__": "what `python -m` runs",
    "settings": "of tuning, of fusing, of sampling, of files: people's scripts import from them",
    "adapters": "trained ones in tuning, put on a base in concepts",
    "drawing": "sampling's own, and the studio's page of it",
    "jobs": "what is to be fused, and what the studio has to do",
    "server": "the center's, and the studio's",
}
"""Module names that stand more than once, and why."""
TYPES_TWICE = {"Job": "of fusing, and of the studio", "State": "of a run of tuning, and of a studio's job"}


def test_no_two_modules_share_a_name() -> None:
    """Those of the command line are called as their commands."""
    names = Counter(path.stem for path in FILES if path.parent.name != "cli")
    assert {name for name, count in names.items() if count > 1} == NAMED_TWICE.keys()


def test_no_two_types_share_a_name() -> None:
    """Classes, and names for types, which are written in capitals like classes. The command line names its options so."""
    places: dict[str, list[str]] = {}
    for path in (path for path in FILES if path.parent.name != "cli"):
        for name in types(parse(path)):
            places.setdefault(name, []).append(label(path))
    assert {name for name, where in places.items() if len(where) > 1} == TYPES_TWICE.keys()


def test_modules_import_without_warnings() -> None:
    # Flower is an extra.
    names = [module_name(path) for path in FILES if path.stem != "__main__" and (find_spec("flwr") or "federation" not in path.parts)]
    done = python("-W", "error", "-c", "".join(f"import {name}\n" for name in names))
    assert done.returncode == 0, done.stderr


def test_help_does_not_wait_for_torch() -> None:
    script = """
import sys
from mixofshow.cli import main
sys.argv = ["mixofshow", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print(sorted({"torch", "diffusers", "transformers", "peft", "accelerate"} & set(sys.modules)), file=sys.stderr)
"""
    done = python("-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip().endswith("[]")
    assert "tune" in done.stdout


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, in which nothing is imported yet."""
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=300)


def parse(path: Path) -> ast.Module:
    """A file's syntax tree."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def public(node: ast.Module | ast.ClassDef) -> Iterator[Function | ast.ClassDef]:
    """Functions, classes and their methods whose names have no underscore in front, at any depth of classes."""
    for child in node.body:
        if isinstance(child, Function | ast.ClassDef) and not child.name.startswith("_"):
            yield child
            if isinstance(child, ast.ClassDef):
                # `forward` is called through the class, whose docstring says what goes in and comes out.
                yield from (method for method in public(child) if method.name != "forward")


def types(tree: ast.Module) -> Iterator[str]:
    """The public types that a module defines."""
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        names += [node.name] if isinstance(node, ast.ClassDef) else []
        yield from (name for name in names if re.fullmatch(r"[A-Z]\w*[a-z]\w*", name))


def dangers(tree: ast.AST) -> list[str]:
    """Everything in the code that could run what a stranger wrote, as texts with line numbers."""
    return [f"line {node.lineno}: {what}" for node in ast.walk(tree) for what in _dangers_of(node)]


def _dangers_of(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_IMPORTS)
    elif isinstance(node, ast.ImportFrom):
        origin = node.module or ""
        if origin in FORBIDDEN_IMPORTS:
            yield origin
        # Under a name of its own the function could not be recognized where it is called.
        yield from (f"{origin}.load" for alias in node.names if origin in ("torch", "yaml") and alias.name == "load")
    elif isinstance(node, ast.Call):
        yield from _dangers_of_call(ast.unparse(node.func), {word.arg: word.value for word in node.keywords})


def _dangers_of_call(name: str, keywords: dict[str | None, ast.expr]) -> Iterator[str]:
    def is_true(keyword: str) -> bool:
        value = keywords.get(keyword)
        return isinstance(value, ast.Constant) and value.value is True

    if name in FORBIDDEN_BUILTINS | FORBIDDEN_CALLS or name.rpartition(".")[2] in FORBIDDEN_METHODS:
        yield name
    if name == "torch.load" and not is_true("weights_only"):
        yield "torch.load without weights_only=True"
    yield from (f"{keyword}=True" for keyword in ("shell", "allow_pickle") if is_true(keyword))


def drawn_tree(drawing: str) -> dict[str, str]:
    """Each class in a drawing of a tree with the class it hangs from; the root hangs from Exception."""
    parents: dict[str, str] = {}
    path: list[tuple[int, str]] = [(-1, "Exception")]
    for line in drawing.splitlines():
        match = re.match(r"^ {4}([│ ]*[├└]── )?([A-Z]\w+) ", line)
        if match:
            depth = len(match.group(1) or "")
            path = [(outer, name) for outer, name in path if outer < depth]
            parents[match.group(2)] = path[-1][1]
            path.append((depth, match.group(2)))
    return parents


@pytest.mark.parametrize("path", sorted((SOURCE.parents[1] / "benchmarks").glob("*.py")), ids=lambda path: path.name)
def test_what_benchmarks_take_from_the_package_is_there(path: Path) -> None:
    """Nobody runs them for months, and what they import is renamed meanwhile."""
    taken = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    for node in taken:
        if (node.module or "").split(".")[0] in {"mixofshow", "emojiland"}:
            module = importlib.import_module(node.module)
            missing = [one.name for one in node.names if not hasattr(module, one.name)]
            assert not missing, f"{node.module} has no {', '.join(missing)}"
