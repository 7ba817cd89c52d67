"""The house that CONTRIBUTING describes: few rooms on the first floor, no circles, nothing private borrowed, short files."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "peft_talora"
MAX_AT_THE_TOP = 18
# names that something is still imported from
FORMER = {"folder_data", "image_files"}
MAX_LINES = {"peft_talora": 350, "examples": 350, "tests": 500}
# these two are read from top to bottom
MAX_LINES_OF_A_STORY = {"examples/train_multitask.py": 450, "examples/scenes.py": 450}


def files(*folders):
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def rooms():
    """The package's modules and folders at the top."""
    found = [path for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    return {path.stem for path in found} - FORMER


def relative(path):
    return path.relative_to(ROOT).as_posix()


@cache
def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path):
    """Every import in a file, inside of functions too: `(line, module, name, what it is called here)`, modules in full."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, None, alias.asname or alias.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                yield node.lineno, source, alias.name, alias.asname or alias.name


@cache
def import_graph():
    """`{module: the modules of the package that it imports}`."""
    modules = {module_name(path): path for path in files("peft_talora")}
    graph = {}
    for module, path in modules.items():
        named = [(source, f"{source}.{name}") for _, source, name, _ in imports_of(path)]
        graph[module] = {full if full in modules else source for source, full in named} & set(modules) - {module}
    return graph


def reachable(graph, start):
    reached, todo = set(), list(graph[start])
    while todo:
        module = todo.pop()
        if module not in reached:
            reached.add(module)
            todo += graph[module]
    return reached


# what stands in this repository: its package, what a script in examples/ imports, and the tests' helpers
OURS = {
    path.stem
    for folder in (ROOT, ROOT / "examples", ROOT / "examples/tiny_sam", ROOT / "tests")
    for path in folder.iterdir()
}


def is_private(name):
    return name is not None and name.startswith("_") and not name.endswith("__")


def test_the_first_floor_is_small():
    assert 10 < len(rooms()) <= MAX_AT_THE_TOP, sorted(rooms())
    for name in FORMER:
        nodes = tree_of(PACKAGE / f"{name}.py").body
        assert not [node for node in nodes if not isinstance(node, ast.Expr | ast.ImportFrom | ast.Assign)], name


def test_no_module_imports_itself_over_others():
    graph = import_graph()
    assert sum(map(len, graph.values())) > 100  # imports are found at all
    assert [module for module in graph if module in reachable(graph, module)] == []


def private_uses(path):
    """Private names of other modules of this repository that a file imports, or takes from a module that it imports."""
    ours = set()
    for line, source, name, here in imports_of(path):
        if source.partition(".")[0] in OURS:
            ours.add(here)
            if is_private(name):
                yield f"{relative(path)}:{line} {source}.{name}"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and getattr(node.value, "id", None) in ours:
            yield f"{relative(path)}:{node.lineno} {node.value.id}.{node.attr}"


def test_nothing_private_is_imported():
    assert [use for path in files("peft_talora", "examples", "tests") for use in private_uses(path)] == []


@pytest.mark.parametrize("folder", MAX_LINES)
def test_files_are_short(folder):
    paths = files(folder)
    assert paths
    lines = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    assert {name: n for name, n in lines.items() if n > MAX_LINES_OF_A_STORY.get(name, MAX_LINES[folder])} == {}


def documented_paths():
    """Every path in CONTRIBUTING's text, and every test that it names: `(path, [class, function])`."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    path, names = "", []
    for quoted in re.findall(r"`([^`\n]+)`(?! of PEFT)", text):
        if quoted.startswith("::"):
            # of the same file, and a lone function of the same class where there is one
            shortened = quoted[2:].split("::")
            same_class = names[:1] if shortened[0].startswith("test") and names[0].startswith("Test") else []
            yield path, [*same_class, *shortened]
        elif re.fullmatch(r"(tests|examples|peft_talora)/[\w./]*(::\w+)*", quoted):
            path, *names = quoted.split("::")
            yield path, names


@pytest.mark.parametrize(("path", "names"), sorted(documented_paths()))
def test_what_contributing_names_exists(path, names):
    assert (ROOT / path).exists()
    nodes = tree_of(ROOT / path).body if names else []
    for name in names:
        found = [node for node in nodes if getattr(node, "name", None) == name]
        assert found, f"{path} has no {name}"
        nodes = getattr(found[0], "body", [])


def test_contributings_map_has_every_room():
    rows = [
        line for line in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines() if line.startswith("| `")
    ]
    named = {word.rstrip("/") for row in rows for cell in row.split("|")[1:2] for word in re.findall(r"[\w/]+", cell)}
    assert rooms() - {"__init__"} <= named, sorted(rooms() - named)
