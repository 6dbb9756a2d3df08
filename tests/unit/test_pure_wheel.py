"""Where no compiler works the installation succeeds as a pure wheel, and doctor says what that costs and how to mend it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ["pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "src", "csrc"]


def test_without_a_compiler(tmp_path):
    for module in ("pip", "scikit_build_core", "nanobind"):
        pytest.importorskip(module, reason="builds a wheel without isolation")
    for name in NEEDED:
        source, ignored = ROOT / name, shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(source, tmp_path / name, ignore=ignored) if source.is_dir() else shutil.copy(source, tmp_path / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(tmp_path / "out"), str(tmp_path)],
        env=os.environ | {"CC": "/bin/false", "CXX": "/bin/false"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "out").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(tmp_path / "installed")
    path = {"PYTHONPATH": os.pathsep.join([str(tmp_path / "installed"), *filter(None, sys.path)])}
    command = [sys.executable, "-m", "apportion.cli.main", "doctor", "--json"]
    doctor = subprocess.run(command, cwd=tmp_path / "installed", env=os.environ | path, capture_output=True)
    report = json.loads(doctor.stdout)
    assert report["kernels"]["chosen"] == "reference"
    assert "reference kernels run" in report["findings"][0]["what"] and "compiler" in report["findings"][0]["fix"]
