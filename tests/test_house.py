"""The rules of the house, checked on the files themselves: sizes, floors of imports, packages, names."""

import ast
import functools
import graphlib
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

AT_IMPORT = hypothesis.settings()  # what @given finds
ROOT = Path(__file__).resolve().parents[1]
SOURCE = [*ROOT.glob("*.py"), *ROOT.glob("zoo/**/*.py"), *ROOT.glob("data/**/*.py")]
FLOORS = ["rcd", "zoo", "zoo.tools", "data", "scripts"]  # imports go down
PACKAGES = {"torch", "numpy", "tiktoken", "tiktoken_ext", "huggingface_hub", "safetensors", "tqdm"}
EXTRAS = {"matplotlib", "pyarrow", "wandb", "lm_eval"}  # optional: imported in the functions that need them
NAMES = {*"think pool terms coins doubt race View Sees weigh alone parts spare_rows".split()}
ALLOWED = {  # exceptions, each with its reason
    ("data.sums.prepare", "terms"),  # a sum has terms
    ("zoo.progress", "**"),  # its bars hand on the options that tqdm and huggingface_hub choose
}


def module(path: Path) -> str:
    """The dotted name a file is imported by."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path): path for path in SOURCE}


@functools.cache
def nodes(name: str) -> list[ast.AST]:
    return [*ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8")))]


def imported(some: list[ast.AST]) -> set[str]:
    """What these nodes import: modules of the project by their full names."""
    found = set()
    for node in some:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else "." * node.level + (node.module or "") for name in full}
    return found


@functools.cache
def graph() -> dict[str, set[str]]:
    """What each module imports of the others, in functions and for type checkers only, too."""
    return {name: imported(nodes(name)) & {*MODULES} for name in MODULES}


def floor(name: str) -> int:
    if name.startswith("zoo.rivals") and name.endswith("__main__"):
        return FLOORS.index("scripts")  # a command, as train.py is
    above = "zoo.tools" if name.startswith("zoo.tools") else name.split(".")[0]
    above = "scripts" if name == "zoo.__main__" else above  # python -m zoo
    return FLOORS.index(above if above in FLOORS else "scripts")


def test_there_is_something_to_check():
    assert {"rcd", "zoo.tools.evaluate"} <= graph()["sample"] and {"zoo.files", "zoo.hub"} <= graph()["zoo"]


@pytest.mark.parametrize("name,most", [("rcd.py", 600), ("train.py", 299), ("sample.py", 299)])
def test_what_is_read_from_top_to_bottom_is_short(name, most):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= most


def test_the_readme_is_read_in_five_minutes():
    assert (ROOT / "README.md").stat().st_size <= 12 * 1024


def test_lines_have_at_most_110_columns():
    for path in [*SOURCE, *ROOT.glob("tests/**/*.py")]:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert not [number for number, line in enumerate(lines, 1) if len(line) > 110], path


def test_imports_go_down_only():
    edges = [(name, other) for name in graph() for other in graph()[name]]
    scripts = FLOORS.index("scripts")  # which do not import each other
    up = [(a, b) for a, b in edges if floor(b) > floor(a) or floor(a) == floor(b) == scripts]
    # Of the tools, data knows the command line: evaluation and training take any data set.
    tools = [(a, b) for a, b in edges if floor(a) == 3 and floor(b) == 2]
    assert not up and {b for _, b in tools} <= {"zoo.tools.command"}


def test_no_file_imports_itself_through_others():
    graphlib.TopologicalSorter(graph()).prepare()  # CycleError names the circle


def test_five_packages_are_enough():
    """tiktoken_ext comes with tiktoken, safetensors with huggingface-hub[torch]."""
    for name, path in MODULES.items():
        others = {other.split(".")[0] for other in imported(nodes(name))} - {*sys.stdlib_module_names}
        assert others <= PACKAGES | EXTRAS | {module.split(".")[0] for module in MODULES}, path
        at_once = {other.split(".")[0] for other in imported(nodes(name)[0].body)}
        assert not at_once & EXTRAS, f"{path}: import it in the function that needs it"


def named(node: ast.AST) -> str | None:
    """The name that a node gives to something. Those of other libraries are only read: Path.parts is none."""
    match node:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            return name
        case ast.arg(arg=name) | ast.alias(asname=name) | ast.Name(id=name, ctx=ast.Store()):
            return name
        case ast.Attribute(attr=name, ctx=ast.Store()) | ast.Attribute(value=ast.Name(id="self"), attr=name):
            return name


def test_names_are_those_of_the_field():
    found = {(name, named(node)) for name in MODULES for node in nodes(name) if named(node) in NAMES}
    assert not found - ALLOWED


def test_what_the_source_does_not_do():
    """Options without names, code from strings or pickles: none."""
    found = set()
    for name in MODULES:
        found |= {(name, other) for other in imported(nodes(name)) if other in ("pickle", "marshal", "dill")}
        for node in nodes(name):
            match node:
                case ast.arguments(kwarg=ast.arg()):
                    found.add((name, "**"))
                case ast.Call(func=ast.Name(id="eval" | "exec" | "__import__" as call)):
                    found.add((name, call))
                case ast.keyword(arg="trust_remote_code") | ast.Constant(value="trust_remote_code"):
                    found.add((name, "trust_remote_code"))
                case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="load"), keywords=options):
                    if "weights_only=True" not in map(ast.unparse, options):
                        found.add((name, "torch.load"))
    assert not found - ALLOWED


def test_hypothesis_draws_the_same_examples_everywhere_and_never_runs_out_of_time():
    assert AT_IMPORT.derandomize and AT_IMPORT.deadline is None and AT_IMPORT.database is None
    assert torch.get_num_threads() == 1
