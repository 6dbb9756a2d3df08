"""The same tokens, whoever else is in the batch and however the work was cut: the promises that lanes, caches and preemption rest on."""

import pytest
import torch

from apportion.core.sampling_params import SamplingParams

from .harness import Setup, generate

NUM_TOKENS = 40
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0)
# lengths around block and chunk borders
PROMPTS = [[1, *(3 + (i * 7 + j * 13) % 400 for j in range(length - 1))] for i, length in enumerate((1, 5, 31, 32, 33, 64, 90, 130))]


@pytest.fixture(scope="module", params=["stories260K/hf", "bundled"])
def model(request, shared_data, bundled_model):
    return bundled_model if request.param == "bundled" else shared_data(request.param)


def test_greedy_tokens_are_those_of_transformers(model):
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for prompt, result in zip(PROMPTS, generate(Setup(model=model), PROMPTS, GREEDY), strict=True):
        whole = reference.generate(torch.tensor([prompt]), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)[0]
        assert list(result.token_ids) == whole[len(prompt) :].tolist()
