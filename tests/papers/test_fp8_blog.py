"""vLLM's post on FP8 (Neural Magic, 15 July 2024). Its listings run with nothing changed but imports and paths, and the device where
there is no GPU; what it says of memory, accuracy and checkpoints holds. docs/claims.md has it sentence by sentence."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from apportion import LLM, quantize
from apportion.assets import DEFAULT_MODEL, PASSAGE
from apportion.evaluate.likelihood import nll
from tests.unit.quant import packers

LLAMA = "meta-llama/Meta-Llama-3-8B-Instruct"
READY = """\
from vllm import LLM

model = LLM("neuralmagic/Meta-Llama-3-8B-Instruct-FP8")
result = model.generate("Hello, my name is")
"""
WHILE_LOADING = """\
from vllm import LLM

model = LLM("meta-llama/Meta-Llama-3-8B-Instruct", quantization="fp8")
result = model.generate("Hello, my name is")
"""
CALIBRATED = """\
from datasets import load_dataset
from transformers import AutoTokenizer
from auto_fp8 import AutoFP8ForCausalLM, BaseQuantizeConfig

# Load and tokenize 2048 dataset samples for calibration of activation scales
tokenizer = AutoTokenizer.from_pretrained("meta-llama/Meta-Llama-3-8B-Instruct", use_fast=True)
tokenizer.pad_token = tokenizer.eos_token
ds = load_dataset("neuralmagic/ultrachat_2k", split="train_sft").select(range(2048))
examples = [tokenizer.apply_chat_template(batch["messages"], tokenize=False) for batch in ds]
examples = tokenizer(examples, padding=True, truncation=True, return_tensors="pt").to("cuda")

# Define quantization config with static activation scales
quantize_config = BaseQuantizeConfig(quant_method="fp8", activation_scheme="static")

# Load the model, quantize, and save checkpoint
model = AutoFP8ForCausalLM.from_pretrained("meta-llama/Meta-Llama-3-8B-Instruct", quantize_config)
model.quantize(examples)
model.save_quantized("Meta-Llama-3-8B-Instruct-FP8/")
"""
WRITTEN = """\
from vllm import LLM

model = LLM(model="Meta-Llama-3-8B-Instruct-FP8/")
result = model.generate("Hello, my name is")
"""


def run(listing: str, replaced: dict[str, str]) -> dict:
    """The names that a listing leaves behind. replaced: what is spelt otherwise here; every entry must occur."""
    for theirs, ours in replaced.items():
        assert theirs in listing, theirs
        listing = listing.replace(theirs, ours)
    names: dict = {}
    exec(compile(listing, "listing", "exec"), names)
    return names


def answered(names: dict) -> LLM:
    """The model of a listing that generated text, to be closed."""
    [result] = names["result"]
    assert result.prompt == "Hello, my name is" and result.outputs[0].token_ids and result.outputs[0].finish_reason in ("stop", "length")
    return names["model"]


def loss(llm: LLM) -> float:
    return float(nll(llm, PASSAGE.read_text("utf-8")[40000:50000], window=512)[0].mean())


@pytest.fixture(scope="module")
def original() -> float:
    with LLM(DEFAULT_MODEL) as llm:
        return loss(llm)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder that the post's script made of the bundled model and 2,048 chats of the bundled prose."""
    pytest.importorskip("datasets", reason="the listing loads its text with the package datasets")
    folder = tmp_path_factory.mktemp("blog")
    text = PASSAGE.read_text("utf-8")[:40000]
    chats = folder / "chats" / "data" / "train_sft-00000-of-00001.jsonl"  # a data set's folder: split, number
    chats.parent.mkdir(parents=True)
    with chats.open("w") as file:
        for i in range(2048):
            said = [text[start : start + 60] for start in (19 * i, 19 * i + 60)]
            messages = [{"role": role, "content": content} for role, content in zip(("user", "assistant"), said, strict=True)]
            file.write(json.dumps({"messages": messages}) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HF_HOME", str(folder / "home"))
        replaced = {
            "from auto_fp8 import": "from apportion.compat.auto_fp8 import", LLAMA: str(DEFAULT_MODEL),
            "neuralmagic/ultrachat_2k": str(folder / "chats"),
        }  # fmt: skip
        run(CALIBRATED, replaced | ({} if torch.cuda.is_available() else {'.to("cuda")': '.to("cpu")'}))
    return folder / "Meta-Llama-3-8B-Instruct-FP8"


def test_listings_are_the_posts(shared_data):
    post = shared_data("../seeds/vllm_fp8_blog.txt").read_text("utf-8")
    for listing in (READY, WHILE_LOADING, CALIBRATED, WRITTEN):
        assert listing in post


def test_a_ready_checkpoint(checkpoint):
    with answered(run(READY, {"from vllm import": "from apportion import", "neuralmagic/Meta-Llama-3-8B-Instruct-FP8": str(checkpoint)})):
        pass


def test_quantized_while_loading(original):
    """More than 99 % of the accuracy: here the loss is within 0.5 %."""
    with answered(run(WHILE_LOADING, {"from vllm import": "from apportion import", LLAMA: str(DEFAULT_MODEL)})) as llm:
        assert abs(loss(llm) - original) < 0.005 * original


def test_what_the_script_wrote_loads(checkpoint, monkeypatch, original):
    """In the folder where it was written, with the path as it stands in the post."""
    monkeypatch.chdir(checkpoint.parent)
    with answered(run(WRITTEN, {"from vllm import": "from apportion import"})) as llm:
        assert abs(loss(llm) - original) < 0.005 * original


def test_static_scales_of_weights_and_inputs(checkpoint):
    """The post's table: beside every float8 weight one scale of the tensor and one of its input."""
    check_static_tensors(checkpoint, {f"model.layers.{layer}.{name}" for layer in range(8) for name in packers.LINEARS})


def test_static_scales_of_a_mixture(tmp_path):
    """The same for the model of the table, a Mixtral, expert by expert; it generates. Its router stays as it is."""
    source = packers.write_mixtral(tmp_path / "source")
    tokens = [[(7 * i + 3 * j) % 101 for j in range(40)] for i in range(8)]
    quantize(str(source), tmp_path / "out", "fp8_static", calibration=tokens, format="fp8")
    check_static_tensors(tmp_path / "out", map(packers.mixtral_name, packers.linears(mixture=True)))
    with LLM(tmp_path / "out", tokenizer=DEFAULT_MODEL) as llm:
        assert llm.generate([tokens[0]])[0].outputs[0].token_ids


def check_static_tensors(folder, projections):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    found = {name.removesuffix(".weight") for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn}
    assert found == set(projections)
    for name in found:
        for kind in ("weight_scale", "input_scale"):
            scale = tensors[f"{name}.{kind}"]
            assert scale.dtype == torch.float32 and scale.numel() == 1 and float(scale) > 0, f"{name}.{kind}"


def test_half_the_bytes(checkpoint):
    """Weights take half of bf16's bytes, scales included; fp8 keys and values double the tokens that the same memory holds."""

    def size(folder):
        tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
        return sum(tensor.nbytes for name, tensor in tensors.items() if "_proj" in name)

    assert size(checkpoint) / size(DEFAULT_MODEL) == pytest.approx(0.5, rel=0.001)
    tokens = {}
    for dtype in ("bfloat16", "fp8"):
        with LLM(DEFAULT_MODEL, kv_cache_dtype=dtype, kv_cache_memory=32 << 20) as llm:
            [model] = llm.engine.models.values()
            tokens[dtype] = model.scheduler.kv.max_request_len()
    assert tokens["fp8"] >= 1.95 * tokens["bfloat16"]
