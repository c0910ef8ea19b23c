"""Imports point one way, and the terminal's libraries stay in the files that own them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "sphkv_codebooks": ROOT / "codebooks" / "sphkv_codebooks",
    "sphkv_kernels": ROOT / "kernels" / "sphkv_kernels",
    "sphkv_cli": ROOT / "sphkv_cli",
}
MAY_IMPORT = {
    "sphkv_codebooks": {"sphkv_codebooks"},
    "sphkv_kernels": {"sphkv_kernels", "sphkv_codebooks"},
    "sphkv_cli": {"sphkv_cli", "sphkv_kernels", "sphkv_codebooks"},
}
# Files, or folders that end in a slash.
ONLY_IN: dict[str, set[str]] = {
    "typer": {"sphkv_cli/commands/"},
    "rich": {"sphkv_cli/render.py", "sphkv_cli/table_layout.py"},
    "click": set(),
    "pickle": set(),
}


def imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str) -> None:
    files = sorted(PACKAGES[package].rglob("*.py"))
    assert files
    for path in files:
        foreign = (imported_modules(path) & set(PACKAGES)) - MAY_IMPORT[package]
        assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_is_imported_only_where_it_belongs(library: str) -> None:
    users = {
        str(path.relative_to(ROOT))
        for folder in PACKAGES.values()
        for path in folder.rglob("*.py")
        if library in imported_modules(path)
    }
    places = ONLY_IN[library]
    strangers = {user for user in users if not any(_is_in(user, place) for place in places)}
    assert not strangers


def _is_in(path: str, place: str) -> bool:
    return path.startswith(place) if place.endswith("/") else path == place


def test_no_python_file_lies_in_a_source_root() -> None:
    assert not list((ROOT / "kernels").glob("*.py"))
    assert not list((ROOT / "codebooks").glob("*.py"))


@pytest.mark.parametrize("stage", ["fit", "allocation", "profile", "inspection"])
def test_only_capture_needs_transformers(stage: str) -> None:
    script = (
        f"import sys, sphkv_cli.{stage}.stage; "
        "sys.exit(any(m.split('.')[0] == 'transformers' for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_help_loads_no_heavy_library() -> None:
    script = (
        "import sys, sphkv_cli.app; "
        "print(sorted({'torch', 'numpy', 'scipy', 'h5py', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
