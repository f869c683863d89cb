"""Imports point down only, the pure part is pure, and what users import is documented."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import llmcad_mlx

PACKAGE = Path(llmcad_mlx.__file__).parent

# Bottom to top; the parts of one layer do not import each other. A part is a folder, or a module at the root.
LAYERS = [
    {"errors", "machine", "network", "process"},
    {"sizes"},
    {"settings", "results", "prompt", "detokenizer", "progress", "tree", "files", "markdown"},
    {"policy", "sampling", "models"},
    {"cpu", "memory"},
    {"drafting"},
    {"streaming", "gguf"},
    {"verifying"},
    {"store", "engine"},
    {"estimate", "first_run"},
    {"loader"},
    {"conversations"},
    {"api", "mlx_lm_plugin", "remote"},
    {"report", "doctor"},
    {"measure", "chat"},
    {"serve"},
    {"cli"},
    {"__main__"},
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(file: Path) -> Iterator[str]:
    """Dotted names of everything a file imports, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules(part: str = "") -> list[Path]:
    files = [file for file in sorted(PACKAGE.rglob("*.py")) if file != PACKAGE / "__init__.py"]
    return [file for file in files if not part or part_of(file) == part]


@pytest.mark.parametrize("file", modules(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down_only(file: Path) -> None:
    here = part_of(file)
    assert here in LEVEL, f"{here}: say in LAYERS where it belongs"
    for name in imports_of(file):
        top, _, rest = name.partition(".")
        part = rest.split(".")[0]
        if top != "llmcad_mlx" or part in (here, "__version__"):
            continue
        assert part in LEVEL, f"{file.name} imports {name}: say in LAYERS where it belongs"
        assert LEVEL[part] < LEVEL[here], f"{file.name} imports {name}, which is not below it"


def name_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_imports_form_no_circle() -> None:
    """Between modules, in one folder or across, imports inside functions included."""
    known = {name_of(file) for file in modules()}
    graph = {
        name_of(file): {n if n in known else n.rpartition(".")[0] for n in imports_of(file)} & known
        for file in modules()
    }
    while free := {name for name, imported in graph.items() if not imported}:
        graph = {name: imported - free for name, imported in graph.items() if name not in free}
    assert not graph, f"these modules import each other, or what does: {sorted(graph)}"


# Called by libraries, by name: Starlette, uvicorn, markdown-it, mlx-lm's models, numba, Python's import.
CALLED_BY_LIBRARIES = {
    "render", "send_400_response", "handle_exit", "validateLink", "normalizeLink", "normalizeLinkText",
    "make_mask", "maybe_trim_front", "_guard_against_spurious_io_errors", "MlxLmFinder",
}  # fmt: skip


def names_in(file: Path) -> Iterator[str]:
    """Whatever a file mentions: names, attributes, and strings that could be names."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            yield node.value


def test_nothing_is_there_for_tests_alone() -> None:
    recipes = [file for folder in ("convert", "distill") for file in (PACKAGE.parent / folder).rglob("*.py")]
    mentioned = {name for file in [*modules(), *recipes] for name in names_in(file)}
    defined = {
        node.name: file
        for file in modules()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.decorator_list
        and not node.name.startswith("__")
    }
    public = {name for exported in llmcad_mlx.__all__ for name in (exported, *dir(getattr(llmcad_mlx, exported)))}
    unused = {name for name in defined if name not in mentioned | CALLED_BY_LIBRARIES | public}
    assert not unused, {name: str(defined[name].relative_to(PACKAGE)) for name in unused}


def foreign_imports(part: str) -> set[str]:
    """Top-level packages that a part imports, ours and the standard library left out."""
    names = {name.partition(".")[0] for file in modules(part) for name in imports_of(file)}
    return names - sys.stdlib_module_names - {"llmcad_mlx"}


@pytest.mark.parametrize("part", ["errors", "settings", "results", "tree", "policy", "engine"])
def test_the_bottom_and_the_middle_need_no_library(part: str) -> None:
    assert foreign_imports(part) == set()


def test_the_tree_is_pure() -> None:
    """Data and arithmetic: no model, tokenizer, file, clock or global randomness."""
    files = [*modules("tree"), *modules("policy")]
    roots = {name.partition(".")[0] for file in files for name in imports_of(file)}
    assert not roots & {"time", "os", "io", "pathlib", "random", "threading", "datetime", "tempfile"}
    for file in files:
        calls = [node.func for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        assert not [call for call in calls if isinstance(call, ast.Name) and call.id in ("open", "print", "input")]


def test_the_session_knows_no_kernel_file_or_tokenizer() -> None:
    names = set(imports_of(PACKAGE / "engine" / "session.py"))
    assert not {name.split(".")[1] for name in names if name.startswith("llmcad_mlx.")} & {
        "models",
        "store",
        "files",
    }
    assert not {name.partition(".")[0] for name in names} & {"os", "io", "pathlib", "json"}


@pytest.mark.parametrize(
    ("names", "absent"),
    [
        ("llmcad_mlx.api", {"numba", "matplotlib", "llmcad_mlx.cpu.kernels"}),  # kernels come with the first model
        ("llmcad_mlx.cli.main", {"numba", "matplotlib", "mlx_lm", "transformers"}),  # `--help` answers at once
        ("llmcad_mlx.tree.token_tree, llmcad_mlx.policy.best_first, llmcad_mlx.policy.paper", {"numba"}),
    ],
)
def test_an_import_is_silent_and_loads_little(names: str, absent: set[str]) -> None:
    """In a fresh interpreter."""
    script = f"import sys\nimport {names}\nprint(*({absent!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("\n", "")


@pytest.mark.parametrize("name", [name for name in llmcad_mlx.__all__ if name != "__version__"])
def test_what_users_import_is_documented(name: str) -> None:
    public = getattr(llmcad_mlx, name)
    assert inspect.getdoc(public), f"{name} has no docstring"
    if not inspect.isclass(public):
        return
    for member, value in vars(public).items():
        described = isinstance(value, property | staticmethod | classmethod) or inspect.isfunction(value)
        if described and not member.startswith("_"):
            assert inspect.getdoc(getattr(public, member)), f"{name}.{member} has no docstring"


@pytest.mark.parametrize("file", [PACKAGE / "__init__.py", *modules()], ids=lambda f: str(f.relative_to(PACKAGE)))
def test_every_module_says_what_it_is(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert not tree.body or ast.get_docstring(tree), f"{file} has no docstring"


@pytest.mark.parametrize("file", modules(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_module_keeps_mutable_state(file: Path) -> None:
    """No list or set at module level, no `global`; dicts there are constants, written once."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Global)]
    for node in tree.body:
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        empty = (isinstance(value, ast.Dict) and not value.keys) or (
            isinstance(value, ast.Call)
            and isinstance(value.func, ast.Name)
            and value.func.id in ("dict", "set", "list")
        )
        assert not empty, f"{file}:{node.lineno}: an empty container waits to be filled"
