"""The floors below serving with torch, triton, numpy, safetensors and tokenizers alone: every other package is hidden."""

import subprocess
import sys

CODE = """
import importlib, importlib.abc, pkgutil, sys

HIDDEN = {"jinja2", "huggingface_hub", "rich", "psutil", "yaml", "transformers", "fastapi", "uvicorn", "pydantic", "msgspec", "zmq",
          "prometheus_client", "llguidance", "gguf", "matplotlib", "httptools", "uvloop", "scipy", "sentencepiece"}

class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"{name} is hidden", name=name)

sys.meta_path.insert(0, Hide())
import apportion
ROOMS = "core platforms kernels processor kvcache parallel quant attention layers models engine"
for room in ROOMS.split():
    package = importlib.import_module(f"apportion.{room}")
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if module.name.startswith("apportion.kernels.triton") and importlib.util.find_spec("triton") is None:
            continue
        if not module.name.endswith(("._cpu", ".chat_template")):  # compiled; templates are what jinja2 is for
            importlib.import_module(module.name)
from apportion import LLM, SamplingParams
with LLM(kernels="reference", kv_cache_memory=1 << 24, max_model_len=64, device="cpu") as llm:
    (output,) = llm.generate(["A bare machine"], SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True))
assert len(output.outputs[0].token_ids) == 3
assert not HIDDEN & {name.partition(".")[0] for name in sys.modules}
print("bare")
"""


def test_the_engine_runs_without_serving_packages():
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.strip() == "bare", run.stderr[-2000:]
