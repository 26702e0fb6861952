"""What a user gets from the wheel: both packages, typed, and nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    # The checkout must not be importable, nor a bytecode cache land in it.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", out, PROJECT, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment that holds the wheel, and sees this one's packages for its dependencies.

    A path line in a .pth file adds that directory only, and does not read the .pth files in it: so the editable
    install of the checkout stays out of sight.
    """
    home = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
    python = home / "bin" / "python"
    run(
        sys.executable,
        "-m",
        "pip",
        *("--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel),
        cwd=home,
    )
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip())
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "dependencies.pth").write_text("".join(f"{path}\n" for path in sorted(paths)))
    return python


def test_the_wheel_holds_two_typed_packages_and_no_tests(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"lazyreplica", "lazyreplica_vfs"}
    assert {"lazyreplica/py.typed", "lazyreplica_vfs/py.typed"} <= set(names)
    assert not [name for name in names if re.search(r"\btests?\b|test_|\.(pyc|db|ltx)$", name)]
    assert [name for name in names if name.endswith("LICENSE")]


@pytest.mark.parametrize("package", ["lazyreplica", "lazyreplica_vfs"])
def test_an_installed_package_imports(installed: Path, package: str, tmp_path: Path) -> None:
    where = run(installed, "-c", f"import {package}; print({package}.__file__)", cwd=tmp_path).strip()
    assert Path(where).is_relative_to(installed.parents[1]), "imported from the checkout"


def test_the_command_is_installed(installed: Path, tmp_path: Path) -> None:
    assert "lazyreplica" in run(installed.with_name("lazyreplica"), "--help", cwd=tmp_path)
