"""What a user installs: the wheel and the source distribution, from a checkout with and without symbolic links."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("routers", "kernels", "train", "eval")
SKIPPED = shutil.ignore_patterns(".git", ".venv", "__pycache__", "*.egg-info", ".*_cache", "build", "dist", "runs")
BUILD = "import setuptools.build_meta as backend; print(backend.build_sdist({0!r})); print(backend.build_wheel({0!r}))"


class Built(NamedTuple):
    sdist: Path
    wheel: Path

    def sdist_names(self) -> set[str]:
        """Paths inside the source distribution, without its top directory."""
        with tarfile.open(self.sdist) as archive:
            return {member.name.partition("/")[2] for member in archive.getmembers() if not member.isdir()}

    def wheel_names(self) -> set[str]:
        with zipfile.ZipFile(self.wheel) as archive:
            return set(archive.namelist())


def copy_tree(target: Path) -> None:
    """Copies the working tree, links as links: tracked and new files, or all of an unpacked distribution."""
    if not (ROOT / ".git").exists():
        shutil.copytree(ROOT, target, symlinks=True, ignore=SKIPPED)
        return
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    out = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, out.split("\0")):
        source, copy = ROOT / name, target / name
        if source.is_symlink() or source.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy, follow_symlinks=False)


def build(tree: Path, out: Path) -> Built:
    """Builds both distributions with the backend itself: no build environment, no network."""
    out.mkdir()
    done = subprocess.run([sys.executable, "-c", BUILD.format(str(out))], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Built(next(out.glob("*.tar.gz")), next(out.glob("*.whl")))


def our_code() -> set[str]:
    return {p.relative_to(ROOT).as_posix() for room in ("molora", "molora_cli") for p in (ROOT / room).rglob("*.py")}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Both distributions, built from this working tree as it is."""
    base = tmp_path_factory.mktemp("checkout")
    copy_tree(base / "tree")
    return build(base / "tree", base / "out")


def test_wheel_holds_all_code_and_data(built: Built) -> None:
    names = built.wheel_names()
    assert our_code() <= names
    assert "molora/py.typed" in names
    data = {
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.yaml", "*.json")
        for path in (ROOT / "molora").rglob(pattern)
    }
    assert data <= names


def test_wheel_holds_nothing_else(built: Built) -> None:
    """No root link, no tests: only the package, the console module and the metadata."""
    tops = {name.split("/")[0] for name in built.wheel_names()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"molora", "molora_cli"}


def test_wheel_metadata(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        names = {name.partition("/")[2]: name for name in archive.namelist() if ".dist-info/" in name}
        assert "molora = molora_cli:main" in archive.read(names["entry_points.txt"]).decode()
        assert "Apache License" in archive.read(names["licenses/LICENSE"]).decode()


def test_sdist_can_be_tested(built: Built) -> None:
    """Everything that ``make test`` needs is in it, and no room appears twice."""
    names = built.sdist_names()
    wanted = {"Makefile", "constraints.txt", "pyproject.toml", "LICENSE", "README.md", ".ci/run"} | our_code()
    for directory in ("tests", "recipes", "benchmarks"):
        files = (path for path in (ROOT / directory).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        wanted |= {path.relative_to(ROOT).as_posix() for path in files}
    assert wanted <= names
    assert not {name for name in names if name.split("/")[0] in ROOMS}


@pytest.mark.parametrize("links", ["absent", "text"])
def test_same_distributions_without_links(built: Built, tmp_path: Path, links: str) -> None:
    """git writes a link as a text file where core.symlinks=false; the result must be the same."""
    tree = tmp_path / "tree"
    copy_tree(tree)
    for room in ROOMS:
        (tree / room).unlink(missing_ok=True)
        if links == "text":
            (tree / room).write_text(f"molora/{room}")
    other = build(tree, tmp_path / "out")
    assert other.wheel_names() == built.wheel_names()
    assert other.sdist_names() == built.sdist_names()


@pytest.mark.slow
def test_install_from_sdist(built: Built, tmp_path: Path) -> None:
    """pip builds the package from the unpacked source distribution, and molora imports from there."""
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index", "--no-deps"]
    done = subprocess.run(
        [*pip, "--no-build-isolation", "--target", str(target), str(built.sdist)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    code = "import molora, molora.routers, molora.kernels, molora_cli; print(molora.__file__, *molora.kernels.__path__)"
    env = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for path in done.stdout.split():
        assert Path(path).is_relative_to(target), f"imported {path}, wanted it from {target}"
