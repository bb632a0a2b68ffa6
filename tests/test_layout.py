"""The house rules that a reader relies on: where things are, and who may import whom."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "molora"
ROOMS = ("routers", "kernels", "train", "eval")
MAX_LINES = 400

# What each room may import beside the standard library. "molora.checks", "molora.suggest" is a leaf: text in, text out.
# megablocks, grouped_gemm and stk are what the kernel adapters adapt; they are imported inside functions.
ALLOWED = {
    "kernels": {"torch", "triton", "megablocks", "grouped_gemm", "stk", "molora.kernels"},
    "routers": {"torch", "molora.routers", "molora.checks", "molora.suggest"},
}
# Imports run one way: routers, kernels <- core <- train, eval, serve, bench, integrations <- cli.
FORBIDDEN = {
    "eval": {"molora.train", "molora.bench", "molora.cli", "molora_cli"},
    "serve": {"molora.train", "molora.bench", "molora.cli", "molora_cli"},
    "train": {"molora.bench", "molora.cli", "molora_cli"},
    "integrations": {"molora.bench", "molora.cli", "molora_cli"},
    "bench": {"molora.train", "molora.cli", "molora_cli"},
}


def sources(*parts: str) -> list[Path]:
    """Our Python files under a directory of the repository, without following the root links."""
    return sorted(ROOT.joinpath(*parts).rglob("*.py"))


def all_sources() -> list[Path]:
    top = sorted(ROOT.glob("*.py"))
    return top + [path for name in ("molora", "molora_cli", "tests", "benchmarks") for path in sources(name)]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yields (line, absolute dotted name) of each import in a file, at any depth; relative ones are resolved.

    ``from molora import kernels`` yields ``molora.kernels``: the name of the package alone would hide the room.
    """
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{source}.{alias.name}"


def is_within(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


@pytest.mark.parametrize("room", ROOMS)
def test_root_link(room: str) -> None:
    link = ROOT / room
    if not link.is_symlink():
        # A checkout with core.symlinks=false has a text file here, a source distribution has nothing.
        assert not link.is_dir(), f"{room}/ at the root must be a link to molora/{room}, it is a real directory"
        pytest.skip(f"this checkout has no symbolic links: {room} is {'a text file' if link.exists() else 'absent'}")
    assert os.readlink(link) == f"molora/{room}"
    assert link.is_dir(), f"{room} points at nothing"


def test_kernels_is_a_namespace_directory() -> None:
    """A regular package of this name at the root would shadow Hugging Face's ``kernels``."""
    assert not (PACKAGE / "kernels" / "__init__.py").exists()


def test_installed_kernels_package_wins_at_the_root(tmp_path: Path) -> None:
    """Hugging Face's ``kernels``, if installed, is what ``import kernels`` finds from the root."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    code = "import kernels; print(kernels.__file__)"
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert Path(out.stdout.strip()) == tmp_path / "kernels" / "__init__.py"


@pytest.mark.slow
def test_transformers_imports_at_the_root() -> None:
    code = "import sys; assert '' in sys.path; import transformers; transformers.PreTrainedModel"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_setuptools_finds_every_package() -> None:
    from setuptools import find_namespace_packages

    found = set(find_namespace_packages(str(ROOT), include=["molora", "molora.*"]))
    holding_code = {module_name(path.parent / "__init__.py") for path in sources("molora")}
    assert holding_code <= found
    assert not {name for name in found if "__pycache__" in name or name.split(".")[0] in ROOMS}


def test_packages_are_regular_except_kernels() -> None:
    """A forgotten ``__init__.py`` works here and then breaks in tools that want regular packages."""
    missing = {
        path.parent.relative_to(ROOT).as_posix()
        for path in sources("molora")
        if not (path.parent / "__init__.py").exists() and path.relative_to(PACKAGE).parts[0] != "kernels"
    }
    assert not missing


def test_no_bare_room_imports() -> None:
    """``from routers.x import y`` would go through the root link and load a second copy of the module."""
    bad = [
        f"{where(path, line)} imports {name}"
        for path in all_sources()
        for line, name in imports(path)
        if is_within(name, set(ROOMS)) and path != Path(__file__).resolve()
    ]
    assert not bad


def test_no_module_named_like_an_installed_package() -> None:
    """Run as a script, a file sees its own directory first: ``train/datasets.py`` would hide ``datasets``."""
    taken = set(importlib.metadata.packages_distributions()) | sys.stdlib_module_names
    bad = [
        str(path.relative_to(ROOT))
        for room in ROOMS
        for path in sources("molora", room)
        if path.stem != "__init__" and path.stem in taken
    ]
    assert not bad


def test_files_are_short() -> None:
    long = {}
    for path in all_sources():
        count = len(path.read_text(encoding="utf-8").splitlines())
        if count > MAX_LINES:
            long[str(path.relative_to(ROOT))] = count
    assert not long, f"files above {MAX_LINES} lines: {long}; split them by subject"


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_room_imports_only(room: str) -> None:
    """Kernels know no router and no model, routers know no kernel and no model."""
    bad = [
        f"{where(path, line)} imports {name}"
        for path in sources("molora", room)
        for line, name in imports(path)
        if name.split(".")[0] not in sys.stdlib_module_names and not is_within(name, ALLOWED[room])
    ]
    assert not bad


@pytest.mark.parametrize("room", sorted(FORBIDDEN))
def test_room_never_imports(room: str) -> None:
    bad = [
        f"{where(path, line)} imports {name}"
        for path in sources("molora", room)
        for line, name in imports(path)
        if is_within(name, FORBIDDEN[room])
    ]
    assert not bad


def test_core_imports_no_outer_package() -> None:
    """The model itself (files directly in molora/) needs no training, evaluation or serving code."""
    outer = {"molora.train", "molora.eval", "molora.serve", "molora.bench", "molora.cli", "molora_cli"}
    bad = [
        f"{where(path, line)} imports {name}"
        for path in sorted(PACKAGE.glob("*.py"))
        if path.name != "cli.py"
        for line, name in imports(path)
        if is_within(name, outer)
    ]
    assert not bad


def test_imports_reads_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules above are only as good as this reader."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "molora" / "eval" / "suite.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import molora.train.loop as loop\nfrom molora import train\nfrom ..train import data\n"
        "from . import report\ndef f():\n    from molora.train.data import read\n"
    )
    assert sorted(imports(path)) == [
        (1, "molora.train.loop"),
        (2, "molora.train"),
        (3, "molora.train.data"),
        (4, "molora.eval.report"),
        (6, "molora.train.data.read"),
    ]
