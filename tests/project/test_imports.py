"""The arrows between the parts run one way, wherever an import stands: at the top, in a function, for types."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import softcap_runtime

ROOT = Path(softcap_runtime.__file__).parent
# From the top down: a module imports from its own layer, or from lower ones.
LAYERS: list[tuple[str, ...]] = [
    ("cli", "integrations", "flex_attention", "presets"),
    ("runtime",),
    ("distributed", "paged", "prewarm", "report"),
    ("supply", "plans"),
    ("ops",),
    ("engines",),
    ("cpu", "cuda"),
    ("engines.engine", "cuda.options"),
    ("masks",),
    ("artifacts",),
    ("store",),
    ("engines.spec",),
    ("checks", "reference"),
    ("compat",),
    ("config", "errors"),
]
HEAVY = ("torch._dynamo", "torch._inductor", "triton")


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports_of(name: str) -> set[str]:
    """The modules of ours that a module names in imports, anywhere in it."""
    path, found = MODULES[name], set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join(["softcap_runtime", *filter(None, up), *filter(None, [node.module or ""])])
            wanted = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for one in wanted:
            if one.split(".")[0] == "softcap_runtime":
                inside = one.partition(".")[2]
                while inside and inside not in MODULES:
                    inside = inside.rpartition(".")[0]
                if inside:
                    found.add(inside)
    return found - {name}


def layer_of(name: str) -> int:
    while name:
        for place, parts in enumerate(LAYERS):
            if name in parts:
                return place
        name = name.rpartition(".")[0]
    raise AssertionError("no layer")


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_a_module_imports_from_its_layer_or_below(name: str) -> None:
    upwards = {other for other in imports_of(name) if layer_of(other) < layer_of(name)}
    assert not upwards, f"{name} imports from a layer above its own"


def test_no_cycle() -> None:
    """Each module can be followed down to those that import nothing of ours."""
    ahead = {name: imports_of(name) for name in MODULES if name}
    while ahead:
        done = {name for name, needs in ahead.items() if not needs & ahead.keys()}
        assert done, f"these import each other: {sorted(ahead)}"
        ahead = {name: needs for name, needs in ahead.items() if name not in done}


def test_the_lowest_import_nothing_of_ours() -> None:
    for name in LAYERS[-1]:
        assert not imports_of(name), name


def test_only_builders_and_compiled_kernels_import_compilers_at_the_top() -> None:
    """Importing the package imports no compiler: see ``test_fresh_process`` for what that costs."""
    for name, path in MODULES.items():
        for node in ast.parse(path.read_text()).body:
            wanted = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            wanted += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            heavy = {one for one in wanted if one.startswith(HEAVY)}
            assert not heavy or name.startswith("cuda."), name
