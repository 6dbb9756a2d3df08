"""Flags that verbs share, spelt as vLLM spells them: the engine's and sampling's.

A flag that is not given leaves the default to the library.
"""

from __future__ import annotations

import argparse
import re
from typing import Any

from apportion.core.config import DTYPES
from apportion.core.errors import InvalidParameter
from apportion.core.kv_spec import ALIASES, KV_FORMATS

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def parse_bytes(text: str) -> int:
    """'4GiB', '512M', '1e9' -> bytes."""
    match = re.fullmatch(r"([\d.]+(?:e\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes such as 4GiB or 512M")
    return int(float(match[1]) * _UNITS[match[2]])


def parse_logit_bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition(":")
    try:
        return int(token), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not TOKEN_ID:BIAS") from None


def add_engine_flags(parser: argparse.ArgumentParser, *, model: bool = True) -> None:
    """Every keyword of LLM that can be written on a line. model: also which model, where the verb has no argument for it."""
    group = parser.add_argument_group("engine", argument_default=argparse.SUPPRESS)
    if model:
        group.add_argument("--model", metavar="FOLDER_OR_ID", help="checkpoint folder or hub id (default: the bundled model)")
        group.add_argument("--tokenizer", metavar="FOLDER_OR_ID", help="where the tokenizer is, if not beside the model")
    group.add_argument("--revision", help="of a hub model: branch, tag or commit")
    group.add_argument("--dtype", choices=["auto", *DTYPES], help="of weights (default: the checkpoint's)")
    group.add_argument("--quantization", metavar="SCHEME", help="quantize while loading: fp8, fp8_block, int8, w8a16, w4a16, or a scheme")
    group.add_argument("--softmax-table", metavar="FILE", help="of unified maxima, made by `apportion profile --softmax`")
    group.add_argument("--load-format", choices=["auto", "dummy"], help="dummy: random weights of the config's shapes")
    group.add_argument("--device", help="auto, cpu, cuda or rocm")
    group.add_argument("--kernels", help="auto, cpu, triton or reference")
    group.add_argument("--num-threads", type=int, metavar="N", help="compute threads (default: the cores at hand)")
    group.add_argument("--tensor-parallel-size", type=int, metavar="N", help="processes that share each layer")
    group.add_argument("--max-model-len", type=int, metavar="N", help="longest prompt and output together, in tokens")
    group.add_argument("--max-num-seqs", type=int, metavar="N", help="sequences that run at once")
    group.add_argument("--max-num-batched-tokens", type=int, metavar="N", help="tokens of one step")
    group.add_argument("--scheduling-policy", choices=["fcfs", "priority"], help="who runs first")
    group.add_argument("--long-prefill-token-threshold", type=int, metavar="N", help="most tokens of one prompt in a step (0: no limit)")
    group.add_argument("--enable-chunked-prefill", action=argparse.BooleanOptionalAction, help="cut long prompts over steps (default: yes)")
    group.add_argument("--enable-prefix-caching", action=argparse.BooleanOptionalAction, help="share KV of equal beginnings (default: yes)")
    group.add_argument(
        "--kv-cache-memory", type=parse_bytes, metavar="BYTES", help="for the KV cache, such as 4GiB (default: from free memory)"
    )
    group.add_argument("--kv-cache-dtype", choices=["auto", *KV_FORMATS, *ALIASES], help="of the KV cache (default: the weights')")
    group.add_argument("--block-size", type=int, choices=[32, 64, 128], help="tokens of a KV block")
    group.add_argument("--seed", type=int, metavar="N", help="of the engine: draws the seeds of requests that name none")


ENGINE_FLAGS = (
    "revision", "dtype", "quantization", "softmax_table", "load_format", "device", "kernels", "num_threads", "tensor_parallel_size",
    "max_model_len", "max_num_seqs", "max_num_batched_tokens", "scheduling_policy", "long_prefill_token_threshold",
    "enable_chunked_prefill", "enable_prefix_caching", "kv_cache_memory", "kv_cache_dtype", "block_size", "seed",
)  # fmt: skip


def engine_keywords(args: argparse.Namespace) -> dict[str, Any]:
    """The keywords of `llm.engine_config` that were given."""
    return {name: getattr(args, name) for name in ENGINE_FLAGS if hasattr(args, name)}


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """The fields of SamplingParams that can be written on a line; --sampling-seed is its `seed`."""
    group = parser.add_argument_group("sampling", argument_default=argparse.SUPPRESS)
    group.add_argument("--temperature", type=float, help="0 is greedy")
    group.add_argument("--top-k", type=int)
    group.add_argument("--top-p", type=float)
    group.add_argument("--min-p", type=float)
    group.add_argument("--presence-penalty", type=float)
    group.add_argument("--frequency-penalty", type=float)
    group.add_argument("--repetition-penalty", type=float)
    group.add_argument("--sampling-seed", dest="sampling_seed", type=int, help="of every request; the same seed gives the same text")
    group.add_argument("--max-tokens", type=int, help="longest output")
    group.add_argument("--min-tokens", type=int)
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    group.add_argument("--stop-token-ids", type=int, nargs="+", metavar="ID")
    group.add_argument("--include-stop-str-in-output", action="store_true")
    group.add_argument("--ignore-eos", action="store_true", help="do not stop at the end-of-text token")
    group.add_argument("--logit-bias", type=parse_logit_bias, nargs="+", metavar="ID:BIAS")
    group.add_argument("--bad-words", action="append", metavar="TEXT", help="text that must not come; may be repeated")
    group.add_argument("--truncate-prompt-tokens", type=int, metavar="N", help="keep the last N tokens of a prompt (-1: as many as fit)")


_SAMPLING_FLAGS = (
    "n", "temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "max_tokens",
    "min_tokens", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "logprobs", "prompt_logprobs", "bad_words",
    "truncate_prompt_tokens",
)  # fmt: skip


def sampling_keywords(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of SamplingParams that were given. Errors: InvalidParameter when two biases name one token."""
    given = {name: getattr(args, name) for name in _SAMPLING_FLAGS if hasattr(args, name)}
    if hasattr(args, "sampling_seed"):
        given["seed"] = args.sampling_seed
    if hasattr(args, "logit_bias"):
        given["logit_bias"] = dict(args.logit_bias)
        if len(given["logit_bias"]) != len(args.logit_bias):
            raise InvalidParameter("--logit-bias names a token twice")
    return given
