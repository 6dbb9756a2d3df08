"""What the runner does around a model: which rows get logits, prompts in pieces, a request that fails alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from apportion.core.sampling_params import PromptReference, SamplingParams
from apportion.core.schedule import NewRequest, SchedulerOutput
from apportion.engine import model_runner
from apportion.engine.model_runner import ModelRunner
from apportion.kernels.reference.ops import ReferenceOps

VOCAB = 40
TABLE = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))
GREEDY = SamplingParams(temperature=0.0)


class Bigram:
    """The logits of the next token are a row of a table. It counts the rows it was asked for."""

    site = SimpleNamespace(spec=SimpleNamespace(vocab=VOCAB), group=SimpleNamespace(size=1))

    def __init__(self, table=TABLE):
        self.table, self.logit_rows = table, []

    def forward(self, token_ids_T, context):
        assert len(context.metadata) == 1 and context.metadata[0].num_tokens == len(token_ids_T) == len(context.positions_T)
        return torch.nn.functional.one_hot(token_ids_T.long(), VOCAB).float()

    def compute_logits(self, hidden_RM):
        self.logit_rows.append(len(hidden_RM))
        return self.table[hidden_RM.argmax(-1)]


def runner(model):
    return ModelRunner(model, [SimpleNamespace(plan=lambda metadata: metadata, recomputed=0)], ReferenceOps())


def new(request_id, tokens, params=GREEDY, computed=0):
    return NewRequest(request_id, tokens, len(tokens), computed, params, ([0],))


def step(number, counts, *requests):
    return SchedulerOutput(number, "m", counts, list(requests))


def test_only_rows_that_are_sampled_get_logits():
    model = Bigram()
    run = runner(model)
    output = run.execute(step(0, {"a": 3, "b": 2}, new("a", [1, 2, 3]), new("b", [4, 5, 6])))
    assert output.token_ids == {"a": [int(TABLE[3].argmax())], "b": []} and model.logit_rows == [1]
    output = run.execute(step(1, {"b": 1, "a": 1}))
    assert output.token_ids == {"a": [int(TABLE[TABLE[3].argmax()].argmax())], "b": [int(TABLE[6].argmax())]}
    assert model.logit_rows == [1, 2] and output.execute_s > 0
    assert run.execute(SchedulerOutput(2, "m", {}, finished_ids=["a", "b"])).token_ids == {}


@pytest.mark.parametrize(("chunks", "piece"), [([7], 1 << 22), ([3, 4], 1 << 22), ([1, 5, 1], 2 * VOCAB)])
def test_prompt_logprobs_cover_every_position_but_the_first(monkeypatch, chunks, piece):
    monkeypatch.setattr(model_runner, "PROMPT_LOGPROB_ELEMENTS", piece)
    prompt, run = [1, 9, 2, 8, 3, 7, 4], runner(Bigram())
    params = SamplingParams(temperature=0.0, prompt_logprobs=2)
    found, news = [], [new("a", prompt, params), new("b", [5, 6])]
    for number, chunk in enumerate(chunks):
        output = run.execute(step(number, {"a": chunk} | ({"b": 2} if not number else {}), *news))
        found += output.prompt_logprobs["a"]
        assert "b" not in output.prompt_logprobs
        news = []
    expected = TABLE.log_softmax(-1)
    assert [entry.token_ids[0] for entry in found] == prompt[1:]
    for entry, token, after in zip(found, prompt, prompt[1:], strict=False):
        assert entry.logprobs[0] == pytest.approx(float(expected[token, after]), abs=1e-5)
        assert entry.token_ids[1:] == TABLE[token].argsort(descending=True)[:2].tolist() and entry.ranks[1:] == [1, 2]


@pytest.mark.parametrize("chunks", [[7], [3, 4], [1, 5, 1]])
def test_a_prompt_is_compared_with_what_another_model_left(tmp_path, monkeypatch, chunks):
    """KL(reference || model) at each position, however either prompt was cut, next to rows that belong to somebody else."""
    monkeypatch.setattr(model_runner, "PROMPT_LOGPROB_ELEMENTS", 3 * VOCAB)
    prompt, first_row = [1, 9, 2, 8, 3, 7, 4], 2
    path = tmp_path / "rows"
    np.full((10, VOCAB), 5.0, np.float32).tofile(path)

    def score(table, chunks, compare):
        reference = PromptReference(str(path), first_row, VOCAB, compare)
        news = [new("a", prompt, SamplingParams(temperature=0.0, prompt_logprobs=1, prompt_reference=reference))]
        run, found = runner(Bigram(table)), []
        for number, chunk in enumerate(chunks):
            output = run.execute(step(number, {"a": chunk}, *news))
            assert not output.errors
            found += output.prompt_logprobs["a"]
            news = []
        return found

    assert all(entry.kl is None for entry in score(TABLE, [4, 3], False))
    rows = torch.from_numpy(np.fromfile(path, np.float32).reshape(10, VOCAB))
    assert torch.equal(rows[2:8], TABLE[prompt[:-1]].log_softmax(-1)) and bool((rows[[0, 1, 8, 9]] == 5.0).all())
    other = TABLE + 0.3 * torch.randn(TABLE.shape, generator=torch.Generator().manual_seed(1))
    p, q = (table[prompt[:-1]].double().log_softmax(-1) for table in (TABLE, other))
    assert [entry.kl for entry in score(other, chunks, True)] == pytest.approx((p.exp() * (p - q)).sum(-1).tolist(), abs=1e-6)
    assert [entry.kl for entry in score(TABLE, chunks, True)] == [0.0] * 6


@pytest.mark.parametrize(
    ("path", "vocab", "said"), [("rows", VOCAB + 1, "vocabulary of 41 tokens and this model one of 40"), ("no", VOCAB, "mapped")]
)
def test_a_reference_that_does_not_fit_fails_one_request(tmp_path, path, vocab, said):
    np.zeros((2, VOCAB), np.float32).tofile(tmp_path / "rows")
    params = SamplingParams(temperature=0.0, prompt_logprobs=0, prompt_reference=PromptReference(str(tmp_path / path), 0, vocab, True))
    output = runner(Bigram()).execute(step(0, {"a": 1, "bad": 3}, new("a", [1]), new("bad", [3, 4, 5], params)))
    assert list(output.errors) == ["bad"] and said in output.errors["bad"] and output.token_ids["a"] == [int(TABLE[1].argmax())]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_fail_one_request(bad):
    table = TABLE.clone()
    table[3, 11] = bad
    run = runner(Bigram(table))
    requests = [new("a", [1]), new("bad", [3]), new("c", [2], SamplingParams(temperature=0.0, logprobs=1))]
    output = run.execute(step(0, dict.fromkeys(("a", "bad", "c"), 1), *requests))
    assert output.token_ids == {"a": [int(TABLE[1].argmax())], "bad": [], "c": [int(TABLE[2].argmax())]}
    assert list(output.errors) == ["bad"] and "NaN or infinite logits at position 1" in output.errors["bad"]
    # a step of it may be in flight already: it must do no harm
    assert run.execute(step(1, {"bad": 1, "a": 1})).token_ids["a"] == [int(TABLE[TABLE[1].argmax()].argmax())]


def test_a_token_outside_the_vocabulary_fails_one_request():
    run = runner(Bigram())
    requests = [new("a", [1]), new("bad", [3], SamplingParams(temperature=0.0, logit_bias={VOCAB: 1.0}))]
    output = run.execute(step(0, {"a": 1, "bad": 1}, *requests))
    assert list(output.errors) == ["bad"] and output.token_ids["a"] == [int(TABLE[1].argmax())]
