"""The two processes: what the API process may import."""

import subprocess
import sys
from pathlib import Path

import apportion.serving

PROGRAM = """
import sys, importlib
for name in ("torch", "transformers"): sys.modules[name] = None
for name in sys.argv[1:]: importlib.import_module(name)
from apportion.serving import api_server
"""


def test_the_api_process_needs_neither_torch_nor_transformers():
    package = Path(apportion.serving.__file__).parent
    files = [f for f in sorted(package.rglob("*.py")) if f.name not in ("engine_process.py", "model_loader.py")]
    modules = [".".join(("apportion.serving", *f.relative_to(package).with_suffix("").parts)) for f in files if f.name != "__init__.py"]
    assert "apportion.serving.routes.chat" in modules
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *modules, "apportion.cli.serve"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
