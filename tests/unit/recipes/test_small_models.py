"""The trained modules compute what transformers computes from the checkpoint they write; the loss and the rows are what they say."""

import json
import random

import numpy as np
import pytest
import torch

from apportion.assets import DEFAULT_MODEL

COMMON = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "rms_norm_eps": 1e-5, "max_position_embeddings": 32, "tie_word_embeddings": True,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
}  # fmt: skip
DENSE = COMMON | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
MIXTURE = COMMON | {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip


@pytest.mark.parametrize("config", [DENSE, MIXTURE], ids=["dense", "moe"])
def test_logits_equal_transformers(config, recipe, tmp_path):
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    small = recipe("small_models")
    torch.manual_seed(3)
    model = small.Decoder(config)
    for parameter in model.parameters():  # nothing at its neutral value
        parameter.data += 0.1 * torch.randn_like(parameter)
    save_file({name: tensor.contiguous() for name, tensor in small.checkpoint_of(model).items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(0, 64, (3, 20))
    with torch.no_grad():
        torch.testing.assert_close(model(ids) @ model.embed_tokens.weight.T, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    again = small.Decoder(config)
    small.load_checkpoint(again, small.checkpoint_of(model))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_experts_that_hold_every_neuron_compute_the_dense_layers(recipe, monkeypatch):
    """A dense decoder in experts that need leave nothing out: the fitted outputs are those of the layers they are made from."""
    small, upcycled = recipe("small_models"), recipe("upcycled")
    monkeypatch.setattr(upcycled, "RIDGE", 1e-6)
    dense = small.Decoder(DENSE)
    for parameter in dense.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    config = upcycled.config_of_mixture(DENSE, num_experts=4, top_k=2, ffn_dim=DENSE["intermediate_size"])
    mixture = upcycled.upcycle(dense, config, torch.randint(0, 64, (32, 32)), seed=0)
    rows = torch.randn(2, 10, DENSE["hidden_size"])
    with torch.no_grad():
        for given, made in zip(dense.layers, mixture.layers, strict=True):
            wanted = given.mlp(rows)
            assert (made.mlp(rows) - wanted).norm() < 0.02 * wanted.norm()
            assert torch.equal(given.self_attn.o_proj.weight, made.self_attn.o_proj.weight)
    assert isinstance(mixture.layers[0].mlp, small.MLP) and [len(moe.load) for moe in mixture.mixtures()] == [4]


def test_the_loss_in_pieces_is_cross_entropy(recipe):
    loss = recipe("weighted_loss")
    torch.manual_seed(0)
    hidden = torch.randn(700, 16, requires_grad=True)
    table = torch.randn(40, 16, requires_grad=True)
    targets, weights = torch.randint(0, 40, (700,)), torch.rand(700)
    losses = torch.nn.functional.cross_entropy(hidden @ table.T, targets, reduction="none")
    expected = torch.autograd.grad((losses * weights).sum(), (hidden, table))
    total, nlls, _ = loss.WeightedLoss.apply(hidden, table, targets, weights)
    torch.testing.assert_close(nlls, losses.detach())
    for ours, theirs in zip(torch.autograd.grad(total, (hidden, table)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_muon_moves_along_the_polar_factor(recipe):
    muon = recipe("muon")
    torch.manual_seed(1)
    matrix = torch.randn(24, 40)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    ours = muon.orthogonalise(matrix.bfloat16()[None])[0].float()
    assert torch.nn.functional.cosine_similarity(ours.flatten(), (u @ vh).flatten(), dim=0) > 0.95
    assert 0.5 < torch.linalg.svdvals(ours).min() and torch.linalg.svdvals(ours).max() < 1.4


def test_rows_repeat_themselves_and_learn_no_test_key(recipe):
    from tokenizers import Tokenizer

    mixing = recipe("training_mix")
    tokenizer = Tokenizer.from_file(str(DEFAULT_MODEL / "tokenizer.json"))
    texts = [f"Number {n} is here. It was seen by {n + 1} people, and by a dog. Nobody spoke of it." for n in range(200)]
    mix = mixing.TrainingMix(tokenizer, texts, [("What is 2 + 2?", "4")], seed=1)
    stage = mixing.Stage(1.0, length=256, text=0.3, words=5, repeat=1, recall=1, chat=1)
    position = 0
    for place in range(30):
        row, position = mix.row(stage, 4, place, position)
        again, _ = mix.row(stage, 4, place, position if (row.kinds != mixing.KINDS.index("text")).any() else position - 256)
        assert len(row.ids) == 257 and len(row.weights) == len(row.kinds) == 256
        assert np.array_equal(row.ids, again.ids) and np.array_equal(row.weights, again.weights)
        if (row.kinds == mixing.KINDS.index("text")).all():
            assert (row.weights == 1).all()
    samples = [mix._sample(random.Random(n), 400) for n in range(60)]
    assert not {word for s in samples for word in s.answer.split()} & set(mixing.tasks.words_of("test"))
