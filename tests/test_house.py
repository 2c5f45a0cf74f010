"""The package's own import graph: downward only, without circles, in rooms of bounded size."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "mlra_jax"
# From the ground up; a room imports rooms of lower floors only (CONTRIBUTING.md has the figure).
FLOORS = (
    {"extras"},
    {"storage", "snapshots"},
    {"files", "settings_tree", "command", "checksums"},
    {"scaling", "execution"},
    {"config", "data", "kernels", "remat"},
    {"sharding", "checkpoints"},
    {"layers", "cache"},
    {"overlap"},
    {"attention"},
    {"model", "costs", "rest_of_layer"},
    {"convert", "decoder", "training"},
    {"loading", "saving", "generation", "export", "profile", "report"},
    {"evaluate", "analysis", "plan"},
)


def modules(root: Path = PACKAGE) -> dict[str, Path]:
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = (root.name, *path.relative_to(root).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The package's own modules that a file imports, also those imported late."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else node.module)
    return found & known.keys()


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A path that comes back to where it began, or nothing."""
    done: set[str] = set()

    def walk(at: str, path: list[str]) -> list[str]:
        if at in path:
            return [*path[path.index(at) :], at]
        if at in done:
            return []
        for to in sorted(graph[at]):
            if found := walk(to, [*path, at]):
                return found
        done.add(at)
        return []

    return next((found for start in sorted(graph) if (found := walk(start, []))), [])


def room(module: str, known: dict[str, Path]) -> str:
    """The folder or file of the package that a module is in or is."""
    return known[module].relative_to(PACKAGE).with_suffix("").parts[0]


def rooms(known: dict[str, Path]) -> dict[str, set[str]]:
    """What each room imports. `__main__` and the package itself stand above all rooms."""
    graph: dict[str, set[str]] = {}
    for module, path in known.items():
        if path.stem != "__main__" and module != "mlra_jax":
            here = room(module, known)
            wanted = {room(to, known) for to in imports(path, known) if to != "mlra_jax"}
            graph.setdefault(here, set()).update(wanted - {here})
    return graph


def test_modules_import_each_other_without_circles():
    known = modules()
    graph = {name: imports(path, known) - {name} for name, path in known.items()}
    # A package's __init__ gathers what is inside it.
    graph = {
        name: {to for to in wanted if not to.startswith(name + ".")}
        for name, wanted in graph.items()
    }
    assert not circle(graph), " -> ".join(circle(graph))


def test_rooms_import_lower_floors_only():
    floor_of = {room: floor for floor, rooms_of in enumerate(FLOORS) for room in rooms_of}
    graph = rooms(modules())
    assert graph.keys() == floor_of.keys(), "a room without a floor, or a floor without its room"
    upward = [
        f"{here} -> {to}"
        for here, wanted in graph.items()
        for to in wanted
        if floor_of[to] >= floor_of[here]
    ]
    assert not upward, ", ".join(upward)


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert not circle({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_files_and_functions_stay_readable():
    for path in PACKAGE.rglob("*.py"):
        kernels, text = "kernels" in path.parts, path.read_text()
        lines = len(text.splitlines())
        assert kernels or lines <= 400, f"{path.name} has {lines} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                limit = 120 if kernels else 80
                assert lines <= limit, f"{path.name}: {node.name} has {lines} lines"
