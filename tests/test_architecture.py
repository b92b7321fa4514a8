"""The five rules of docs/architecture.md, read from the source with `ast` and from a fresh interpreter."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Imports go down this table, or sideways where that makes no circle. Every module stands here, or below one.
FLOORS = {
    "glmui": 0,
    "glmui.errors": 0,
    "glmui.types": 0,
    "glmui.settings": 0,
    "glmui.prompts": 0,
    "glmui.durable": 0,
    "glmui.i18n": 0,
    "glmui.notes": 0,
    "glmui.text": 1,
    "glmui.store": 1,
    "glmui.knowledge": 1,
    "glmui.meter": 1,
    "glmui.logs": 1,
    "glmui.confined": 1,
    "glmui.confinement": 1,
    "glmui.workshop": 1,
    "glmui.glm": 2,
    "glmui.quant": 2,
    "glmui.memory": 3,
    "glmui.memory.trouble": 1,  # needs nothing, and kernels need it
    "glmui.engine": 3,
    "glmui.bench": 3,
    "glmui.quantizing": 3,
    "glmui.hub": 3,
    "glmui.answering": 4,
    "glmui.chat": 4,
    "glmui.jobs": 4,
    "glmui.saving": 4,
    "glmui.outlook": 4,
    "glmui.choice": 4,
    "glmui.downloads": 4,
    "glmui.listen": 4,
    "glmui.doctor": 4,
    "glmui.tools": 4,
    "glmui.api": 5,
    "glmui.ui": 5,
    "glmui.security": 6,
    "glmui.splash": 6,
    "glmui.server": 6,
    "glmui.cli": 6,
    "glmui.__main__": 6,
}
WITHOUT_TORCH = {0, 1, 4, 5, 6}  # floors
ALSO_WITHOUT_TORCH = ("glmui.memory", *(f"glmui.engine.{name}" for name in ("client", "remote", "echo")))
HEAVY = {"torch", "transformers"}


@cache
def sources() -> dict[str, ast.Module]:
    found = {}
    for file in sorted((ROOT / "glmui").rglob("*.py")):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(file.read_text(encoding="utf-8"), str(file))
    return found


def floor_of(module: str) -> int:
    prefixes = [prefix for prefix in FLOORS if f"{module}.".startswith(f"{prefix}.") and prefix != "glmui"]
    if module == "glmui":
        return 0
    if not prefixes:
        pytest.fail(f"{module} stands on no floor: give it one in FLOORS and in docs/architecture.md")
    return FLOORS[max(prefixes, key=len)]


def is_light(module: str) -> bool:
    """Whether neither it nor what it imports may load torch."""
    return floor_of(module) in WITHOUT_TORCH or f"{module}.".startswith(
        tuple(f"{name}." for name in ALSO_WITHOUT_TORCH)
    )


def imports(module: str) -> Iterator[str]:
    """Every module this one imports, wherever the import stands."""
    for node in ast.walk(sources()[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide where things come from"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in sources() else str(node.module) for name in names)


def own_imports(module: str) -> set[str]:
    # The Python API in glmui/__init__.py is lazy, and the map lets it reach up.
    return {name for name in imports(module) if name in sources()} - {module} if module != "glmui" else set()


def test_imports_go_down_only() -> None:
    up = [
        f"{module} (floor {floor_of(module)}) imports {name} (floor {floor_of(name)})"
        for module in sources()
        for name in sorted(own_imports(module))
        if floor_of(name) > floor_of(module)
    ]
    assert not up


def test_there_are_no_circles() -> None:
    try:
        TopologicalSorter({module: own_imports(module) for module in sources()}).prepare()
    except CycleError as circle:
        pytest.fail(" -> ".join(circle.args[1]))


def test_there_are_no_star_imports() -> None:
    stars = [
        module
        for module, tree in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
    ]
    assert not stars


def test_the_app_process_names_no_torch() -> None:
    named = [
        f"{module} imports {name}"
        for module in sources()
        if is_light(module)
        for name in imports(module)
        if name.partition(".")[0] in HEAVY
    ]
    assert not named


def loaded_after_importing(*modules: str) -> set[str]:
    """Which of the heavy packages a fresh interpreter holds after these imports."""
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()} & {*HEAVY, "gradio", "pandas", "numpy"}


def test_the_front_modules_load_nothing_heavy() -> None:
    assert loaded_after_importing("glmui", "glmui.chat", "glmui.server", "glmui.cli") == set()


def test_no_module_of_the_app_process_loads_torch() -> None:
    light = [m for m in sources() if is_light(m)]
    assert not loaded_after_importing(*light) & HEAVY


def test_only_the_page_loads_gradio() -> None:
    below = [m for m in sources() if is_light(m) and floor_of(m) != floor_of("glmui.ui")]
    assert "gradio" not in loaded_after_importing(*below)


def _acts(statement: ast.stmt) -> bool:
    """Whether a statement at the top of a module does more than define."""
    if isinstance(statement, ast.Expr):
        return not isinstance(statement.value, ast.Constant)
    if isinstance(statement, ast.If | ast.Try):
        branches = [*statement.body, *statement.orelse]
        if isinstance(statement, ast.If) and "__name__" in ast.unparse(statement.test):
            return False
        if isinstance(statement, ast.Try):
            branches += [
                inner for handler in statement.handlers for inner in handler.body
            ] + statement.finalbody
        return any(_acts(inner) for inner in branches)
    definitions = (
        ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef,
        ast.Assign, ast.AnnAssign, ast.Pass,
    )  # fmt: skip
    return not isinstance(statement, definitions)


def test_nothing_happens_at_import() -> None:
    acting = [
        f"{module}:{statement.lineno}"
        for module, tree in sources().items()
        for statement in tree.body
        if _acts(statement)
    ]
    assert not acting


def test_app_py_only_starts_the_command_line() -> None:
    docstring, guard = ast.parse((ROOT / "app.py").read_text(encoding="utf-8")).body
    assert isinstance(docstring, ast.Expr)
    assert isinstance(guard, ast.If)
    assert "__name__" in ast.unparse(guard.test)


def test_no_foreign_code_is_run_and_nothing_is_unpickled() -> None:
    assert not [f"{module}:{line}" for module, tree in sources().items() for line in _unsafe(tree)]


def _unsafe(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if given.get("trust_remote_code", "False") != "False":
            yield f"{node.lineno} trusts remote code"
        if name == "torch.load" and given.get("weights_only") != "True":
            yield f"{node.lineno} loads more than weights"
        if name.rpartition(".")[0] in ("pickle", "dill", "joblib", "marshal") and name.endswith(
            ("load", "loads")
        ):
            yield f"{node.lineno} unpickles"
        if name in ("eval", "exec", "os.system"):
            yield f"{node.lineno} runs {name}"
