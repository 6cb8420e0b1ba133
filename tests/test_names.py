"""One public name is one thing in the whole package, and imports form no cycle."""

import ast
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "midpo_ray"
TREES = {p.relative_to(PACKAGE): ast.parse(p.read_text("utf-8")) for p in PACKAGE.rglob("*.py")}


def collisions() -> dict[str, list[str]]:
    """Public module-level classes and functions that several modules define.

    The Python interface (``midpo_ray/__init__.py``) and the commands (``cli.py``) are entry points
    that are named after what they call.
    """
    places = defaultdict(list)
    for path, tree in TREES.items():
        if path in (Path("__init__.py"), Path("cli/local.py"), Path("cli/remote.py")):
            continue
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                places[node.name].append(str(path))
    return {name: sorted(where) for name, where in places.items() if len(where) > 1}


def imports_at_the_top() -> dict[str, set[str]]:
    """Each module of the package with those that it imports when it is loaded."""
    modules = {
        ".".join(("midpo_ray", *p.with_suffix("").parts)).removesuffix(".__init__"): p
        for p in TREES
    }
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        graph[name] = set()
        for node in TREES[path].body:
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1])
            source = f"{base}.{node.module}" if node.module else base
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                graph[name].add(inner if inner in modules else source)
    return graph


def test_no_two_public_things_of_one_name() -> None:
    assert collisions() == {}


def test_no_import_cycle() -> None:
    graph = imports_at_the_top()
    assert sum(map(len, graph.values())) > 100
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        for other in graph.get(module, ()):
            # A module of a package may import from its siblings, whose package is being loaded.
            if not module.startswith(f"{other}."):
                visit(other, (*path, module))
        done.add(module)

    for module in graph:
        visit(module, ())
