"""Checkpoints of each family, written from the families' own descriptions, number by number: nothing of the package is used here.

A packer takes a matrix [N, C] and gives its tensors by suffix and the numbers [N, C] that they mean (float64).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2,
    "num_key_value_heads": 2, "vocab_size": 101, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "dtype": "float32",
    "tie_word_embeddings": False,
}  # fmt: skip
LINEARS = {
    "self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64), "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (96, 64), "mlp.up_proj": (96, 64), "mlp.down_proj": (64, 96),
}  # fmt: skip
NUM_EXPERTS = 4


def linears(mixture: bool = False) -> dict[str, tuple[int, int]]:
    found = {}
    for layer in range(CONFIG["num_hidden_layers"]):
        for name, shape in LINEARS.items():
            if mixture and name.startswith("mlp."):
                for expert in range(NUM_EXPERTS):
                    found[f"model.layers.{layer}.mlp.experts.{expert}.{name[4:]}"] = shape
            else:
                found[f"model.layers.{layer}.{name}"] = shape
    return found


def floats(mixture: bool = False, seed: int = 3) -> dict[str, torch.Tensor]:
    """Every tensor of the model in float32."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "model.embed_tokens.weight": torch.randn(101, 64, generator=generator), "lm_head.weight": torch.randn(101, 64, generator=generator),
        "model.norm.weight": torch.ones(64),
    }  # fmt: skip
    for layer in range(CONFIG["num_hidden_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(64)
        if mixture:
            tensors[f"model.layers.{layer}.mlp.gate.weight"] = torch.randn(NUM_EXPERTS, 64, generator=generator)
        else:
            continue
    for name, shape in linears(mixture).items():
        tensors[f"{name}.weight"] = torch.randn(shape, generator=generator) * 0.2
    return tensors


def write(folder: Path, tensors: dict[str, torch.Tensor], section: dict | None = None, mixture: bool = False, **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIG | ({} if section is None else {"quantization_config": section}) | changes
    if mixture:
        config |= {
            "architectures": ["Qwen3MoeForCausalLM"], "num_experts": NUM_EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 96,
            "norm_topk_prob": True, "head_dim": 16,
        }  # fmt: skip
        for layer in range(CONFIG["num_hidden_layers"]):
            for norm in ("q_norm", "k_norm"):
                tensors[f"model.layers.{layer}.self_attn.{norm}.weight"] = torch.ones(16)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def mixtral_name(name: str) -> str:
    """As published Mixtrals spell a projection or tensor of `linears(mixture=True)`."""
    if ".mlp." not in name:
        return name
    for ours, theirs in ((".mlp.", ".block_sparse_moe."), (".gate_proj", ".w1"), (".up_proj", ".w3"), (".down_proj", ".w2")):
        name = name.replace(ours, theirs)
    return name


def write_mixtral(folder: Path) -> Path:
    """A Mixtral in float32 under its published names."""
    tensors = {mixtral_name(name): tensor for name, tensor in floats(mixture=True).items()}
    changes = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": NUM_EXPERTS, "num_experts_per_tok": 2}
    return write(folder, tensors, **changes)


def quantized(pack, mixture: bool = False, seed: int = 3) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(tensors of a checkpoint whose linears `pack` packed, the tensors they mean in float32)."""
    plain, packed = floats(mixture, seed), {}
    for name in linears(mixture):
        weight = plain.pop(f"{name}.weight")
        tensors, meant = pack(name, weight)
        packed |= {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}
        plain[f"{name}.weight"] = torch.from_numpy(np.asarray(meant, dtype=np.float32))
    kept = {name: tensor for name, tensor in plain.items() if name.removesuffix(".weight") not in linears(mixture)}
    return packed | kept, plain


def autogptq_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """codes [K, N] -> uint32 words [K * bits / 32, N] as AutoGPTQ's pack() makes them, its three-bit case spelt out."""
    k, n = codes.shape
    codes = codes.astype(np.uint64)
    words = np.zeros((k * bits // 32, n), dtype=np.uint64)
    if bits != 3:
        per = 32 // bits
        for row in range(k):
            words[row // per] |= codes[row] << np.uint64(bits * (row % per))
        return words.astype(np.uint32)
    i = row = 0
    while row < len(words):
        for j in range(i, i + 10):
            words[row] |= codes[j] << np.uint64(3 * (j - i))
        i += 10
        words[row] |= codes[i] << np.uint64(30)
        row += 1
        words[row] |= (codes[i] >> np.uint64(2)) & np.uint64(1)
        i += 1
        for j in range(i, i + 10):
            words[row] |= codes[j] << np.uint64(3 * (j - i) + 1)
        i += 10
        words[row] |= codes[i] << np.uint64(31)
        row += 1
        words[row] |= (codes[i] >> np.uint64(1)) & np.uint64(3)
        i += 1
        for j in range(i, i + 10):
            words[row] |= codes[j] << np.uint64(3 * (j - i) + 2)
        i += 10
        row += 1
    return (words & np.uint64(0xFFFFFFFF)).astype(np.uint32)


def gptq(bits=4, group_size=32, sym=True, desc_act=False, v2=False, seed=0):
    def pack(name, weight):
        generator = np.random.default_rng(abs(hash((seed, weight.shape))) % 2**32)
        w = weight.numpy().astype(np.float64).T  # [K, N]
        k, n = w.shape
        size = k if group_size == -1 else group_size
        g_idx = np.arange(k) // size
        if desc_act:
            g_idx = g_idx[generator.permutation(k)]
        top = 2**bits - 1
        q, meant = np.zeros((k, n), dtype=np.int64), np.zeros((k, n))
        scales, zeros = np.zeros((-(-k // size), n), dtype=np.float16), np.zeros((-(-k // size), n), dtype=np.int64)
        for g in range(len(scales)):
            rows = w[g_idx == g]
            low, high = np.minimum(rows.min(0), 0), np.maximum(rows.max(0), 0)
            if sym:
                low, high = -np.maximum(-low, high), np.maximum(-low, high)
            scales[g] = (high - low) / top
            zeros[g] = (top + 1) // 2 if sym else np.clip(np.round(-low / scales[g].astype(np.float64)), 0, top)
        for row in range(k):
            s, z = scales[g_idx[row]].astype(np.float64), zeros[g_idx[row]]
            q[row] = np.clip(np.round(w[row] / s) + z, 0, top)
            meant[row] = s * (q[row] - z)
        stored = zeros if v2 else (zeros - 1) & top
        tensors = {
            "qweight": autogptq_words(q, bits), "qzeros": autogptq_words(stored.T, bits).T.copy(), "scales": scales,
            "g_idx": g_idx.astype(np.int32),
        }  # fmt: skip
        return {key: torch.from_numpy(v.view(np.int32) if v.dtype == np.uint32 else v) for key, v in tensors.items()}, meant.T

    return pack


def awq(group_size=32):
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def words(codes):  # [R, N] -> [R, N / 8]
        packed = np.zeros((codes.shape[0], codes.shape[1] // 8), dtype=np.uint64)
        for column in range(packed.shape[1]):
            for nibble in range(8):
                packed[:, column] |= codes[:, column * 8 + order[nibble]].astype(np.uint64) << np.uint64(4 * nibble)
        return torch.from_numpy(packed.astype(np.uint32).view(np.int32))

    def pack(name, weight):
        w = weight.numpy().astype(np.float64).T
        groups = w.reshape(-1, group_size, w.shape[1])
        low, high = np.minimum(groups.min(1), 0), np.maximum(groups.max(1), 0)
        scales = ((high - low) / 15).astype(np.float16)
        zeros = np.clip(np.round(-low / scales.astype(np.float64)), 0, 15).astype(np.int64)
        s, z = (np.repeat(x.astype(np.float64), group_size, 0) for x in (scales, zeros))
        q = np.clip(np.round(w / s) + z, 0, 15).astype(np.int64)
        return {"qweight": words(q), "qzeros": words(zeros), "scales": torch.from_numpy(scales)}, ((q - z) * s).T

    return pack


def float8(static=False, block=None, channel=False):
    def pack(name, weight):
        if block is None:
            amax = weight.abs().amax(1, keepdim=True) if channel else weight.abs().max()
            scale = (amax / 448).float()
            codes = (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            tensors = {"weight": codes, "weight_scale": scale}
            meant = codes.double() * scale.double()
        else:
            n, c = weight.shape
            scale = torch.zeros(-(-n // block), -(-c // block))
            codes, meant = torch.zeros(n, c, dtype=torch.float8_e4m3fn), torch.zeros(n, c, dtype=torch.float64)
            for i in range(scale.shape[0]):
                for j in range(scale.shape[1]):
                    tile = (slice(i * block, min(n, i * block + block)), slice(j * block, min(c, j * block + block)))
                    scale[i, j] = weight[tile].abs().max() / 448
                    codes[tile] = (weight[tile] / scale[i, j]).to(torch.float8_e4m3fn)
                    meant[tile] = codes[tile].double() * scale[i, j].double()
            tensors = {"weight": codes, "weight_scale_inv": scale}
        if static:
            tensors["input_scale"] = torch.tensor(0.01 + len(name) / 1000)
        return tensors, meant

    return pack


def compressed(weights: dict, form: str, static=False, scale_dtype=torch.float32):
    """By the package compressed-tensors itself."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(**weights)
    compressor = BaseCompressor.get_value_from_registry(form)

    def pack(name, weight):
        n, c = weight.shape
        if args.strategy == "group":
            blocks, axes, shape = weight.view(n, c // args.group_size, args.group_size), (2,), (n, c // args.group_size)
        elif args.strategy == "block":
            r, s = args.block_structure
            padded = torch.nn.functional.pad(weight, (0, -c % s, 0, -n % r))
            blocks, axes, shape = padded.view(padded.shape[0] // r, r, -1, s), (1, 3), (padded.shape[0] // r, padded.shape[1] // s)
        else:
            blocks, axes = weight, (1,) if args.strategy == "channel" else (0, 1)
            shape = (n, 1) if args.strategy == "channel" else (1,)
        scale, zero = calculate_qparams(blocks.amin(axes), blocks.amax(axes), args)
        scale, zero = scale.view(shape).to(scale_dtype), zero.view(shape)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        state = {"weight": weight.to(scale_dtype), "weight_scale": scale, "weight_zero_point": zero}
        packed = compressor.compress(state, scheme)
        meant = compressor.decompress({k: v.double() if k == "weight_scale" else v for k, v in packed.items()}, scheme)["weight"].double()
        if static:
            packed["input_scale"] = torch.tensor([0.01 + len(name) / 1000])
        return packed, meant

    return pack
