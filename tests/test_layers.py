"""The house's floors: a room knows only the rooms below it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("primitives", "envs", "algorithms", "engines", "actors", "gateway", "cli", "chaos")


def files(*folders: str) -> list[Path]:
    return [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]


def imports(file: Path, nodes: Iterator[ast.AST] | None = None) -> Iterator[str]:
    """Absolute names of the modules that `file` imports, inside functions too."""
    package = ["tinsmith", *file.relative_to(ROOT).parts[:-1]]
    for node in nodes if nodes is not None else ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *([node.module] if node.module else [])]
            yield from (".".join([*module, alias.name]) for alias in node.names)


def at_import(file: Path) -> Iterator[str]:
    """What importing `file` imports: nothing inside functions or `if TYPE_CHECKING`."""

    def visit(nodes: list[ast.stmt]) -> Iterator[ast.AST]:
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                continue
            yield node
            for name in ("body", "orelse", "finalbody", "handlers"):
                yield from visit(getattr(node, name, []))

    return imports(file, visit(ast.parse(file.read_text()).body))


def names_room(module: str, room: str) -> bool:
    return f"{module}.".startswith(f"tinsmith.{room}.")


def uses(modules: Iterator[str], *packages: str) -> list[str]:
    return [m for m in modules if m.partition(".")[0] in packages]


@pytest.mark.parametrize("room", FLOORS)
def test_a_room_imports_only_rooms_on_lower_floors(room):
    above = FLOORS[FLOORS.index(room) + 1 :]
    for file in files(room):
        wrong = [m for m in imports(file) if any(names_room(m, other) for other in above)]
        assert not wrong, f"{file.relative_to(ROOT)} imports {wrong}"


def test_primitives_know_no_ray_and_load_torch_only_where_it_is_needed():
    for file in files("primitives"):
        assert not uses(imports(file), "ray")
        assert not uses(at_import(file), "torch", "transformers")


def test_engines_know_neither_ray_nor_asyncio():
    for file in files("engines"):
        assert not uses(imports(file), "ray", "asyncio")


def test_numerics_stay_out_of_the_gateway_and_ray_out_of_all_rooms_but_the_actors():
    for file in files("primitives", "envs", "algorithms", "engines", "gateway", "cli"):
        assert not uses(imports(file), "ray"), file
    for file in files("gateway"):
        assert not uses(imports(file), "torch"), file


def test_outside_the_house_everyone_comes_in_by_the_front_door():
    """Tests, examples and benchmarks import `tinsmith`, never a room by its bare name."""
    for file in files("tests", "examples", "benchmarks"):
        assert not uses(imports(file), *FLOORS), file


def test_the_front_door_is_cheap():
    """Environment processes import tinsmith by the dozen."""
    assert not uses(at_import(ROOT / "__init__.py"), "torch", "ray", "numpy")
    assert set(at_import(ROOT / "__init__.py")) <= {
        "__future__.annotations",
        "importlib",
        "typing.TYPE_CHECKING",
        "typing.Any",
    }
