"""Requests under a grammar and requests for hidden states, among ordinary ones, over fake executors."""

import random
from hashlib import blake2b

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion.core.config import LaneConfig
from apportion.core.errors import InvalidRequest
from apportion.core.pooling_params import PoolingParams
from apportion.engine.step import MASK_PATIENCE_S

from .fake_executor import VOCAB, masked, next_token, visible
from .house import ONE_LANE, TWO_LANES, House, group, prompts
from .test_engine import houses


def allows(history, token):
    return blake2b(repr((history, token)).encode(), digest_size=1).digest()[0] < 40


def mask_after(history):
    bits = [allows(history, token) for token in range(VOCAB)]
    return bytes(sum(bit << i for i, bit in enumerate(bits[start : start + 8])) for start in range(0, VOCAB, 8))


class FakeGrammar:
    """What may come next is a function of what came. length: how many tokens make it complete. delay: of how many asks each mask is not
    ready. fails_at: the number of tokens after which it can follow no further."""

    def __init__(self, length=100, rng=None, fails_at=-1):
        self.length, self.rng, self.fails_at = length, rng, fails_at
        self.history, self.asked, self.computed = [], [], None

    @property
    def is_finished(self):
        return len(self.history) >= self.length

    def accept(self, token):
        assert allows(self.history, token), "a token that the mask excludes was sampled"
        self.history.append(token)
        self.computed = None

    def mask(self, timeout_s):
        assert 0.0 <= timeout_s <= MASK_PATIENCE_S * 1.01
        self.asked.append(len(self.history))
        if len(self.history) == self.fails_at:
            raise InvalidRequest("the grammar gives up")
        if self.computed is None and (self.rng is None or self.rng.random() < 0.4):
            self.computed = mask_after(self.history)
        return self.computed


def expected_under_grammar(house, request, length):
    groups, tokens = house.groups[request.model], list(request.prompt_token_ids)
    while len(tokens) < min(request.max_total_tokens, request.num_prompt_tokens + length):
        token = next_token(request.model, [visible(tokens, g.sliding_window) for g in groups])
        tokens.append(masked(token, mask_after(tokens[request.num_prompt_tokens :])))
    return tokens[request.num_prompt_tokens :]


@settings(max_examples=25, deadline=None)
@given(houses(deaths=True), st.integers(0, 2**32))
def test_every_request_says_what_it_would_say_alone(house, seed):
    rng = random.Random(seed)
    plain, ruled, pooled = [], [], []
    for index, prompt in enumerate(prompts(9, seed, longest=30)):
        max_tokens, name = rng.randint(1, 6), f"r{index}"
        if index % 3 == 0:
            plain.append(house.add(name, prompt, max_tokens))
        elif index % 3 == 1:
            ruled.append(house.add(name, prompt, max_tokens, grammar=FakeGrammar(rng.randint(1, 6), rng)))
        else:
            kind = rng.choice(["last", "mean", "cls"])
            pooled.append(house.add(name, prompt, pooling_params=PoolingParams(pooling_type=kind)))
    house.run()
    for request in plain:
        assert request.output_token_ids == house.expected(request)
    for request in ruled:
        assert request.output_token_ids == expected_under_grammar(house, request, request.grammar.length), request.error
        assert request.finish_reason == ("stop" if request.grammar.is_finished else "length")
    for request in pooled:
        values = {"last": request.prompt_token_ids[-1], "cls": request.prompt_token_ids[0], "mean": sum(request.prompt_token_ids)}
        assert request.pooled == [values[request.pooling_params.pooling_type]] and request.finish_reason == "stop", request.error
        assert request.output_token_ids == []


def test_nobody_waits_for_a_mask():
    house = House({"m": (group(),)})
    grammar = FakeGrammar()
    grammar.rng = type("Never", (), {"random": lambda self: 1.0})()
    slow, quick = house.add("slow", [1, 2, 3], grammar=grammar), house.add("quick", [4, 5], 8)
    early = house.add("early", [7, 8, 9], 8)
    for _ in range(20):
        house.engine.step(0.0)
    assert not slow.output_token_ids and not slow.is_finished
    grammar.rng = None
    house.run()
    assert len(slow.output_token_ids) == 8 and quick.output_token_ids == house.expected(quick)
    assert early.output_token_ids == house.expected(early)


@pytest.mark.parametrize("lanes", [ONE_LANE, TWO_LANES, (LaneConfig(depth=3),)], ids=["one", "two", "depth 3"])
def test_a_grammar_that_gives_up_fails_its_request_alone(lanes):
    house = House({"m": (group(),)}, lanes=lanes)
    first = house.add("first", [1, 2, 3], grammar=FakeGrammar(fails_at=0))
    later = house.add("later", [1, 2, 4], grammar=FakeGrammar(fails_at=3))
    other = house.add("other", [5], 8)
    updates = house.run()
    assert (first.finish_reason, first.error) == (later.finish_reason, later.error) == ("error", "the grammar gives up")
    assert len(later.output_token_ids) == 3 and other.output_token_ids == house.expected(other)
    assert {u.request.request_id for u in updates if u.request.finish_reason == "error"} == {"first", "later"}


def test_with_steps_in_flight_a_grammar_has_one_sample_among_them():
    house = House({"m": (group(),)}, lanes=(LaneConfig(depth=3),), rng=random.Random(0))
    ruled, free = house.add("ruled", [1, 2], 8, grammar=FakeGrammar()), house.add("free", [3], 8)
    most = {"ruled": 0, "free": 0}

    def watch(_):
        for request in (ruled, free):
            most[request.request_id] = max(most[request.request_id], request.num_pending_samples)

    house.run(before_step=watch)
    assert most["ruled"] == 1 and most["free"] == 3


def test_hidden_states_need_no_room_for_output_and_hit_prefixes_where_they_may():
    house = House({"m": (group(),)}, max_position=16)
    prompt = list(range(1, 17))
    for index, kind in enumerate(["last", "last", "mean", "cls"]):
        request = house.add(f"r{index}", prompt, pooling_params=PoolingParams(pooling_type=kind))
        house.run()
        assert request.num_cached_tokens == (12 if index == 1 else 0)
    with pytest.raises(InvalidRequest, match=r"the prompt has 17 tokens and max_model_len is 16$"):
        house.add("long", [*prompt, 17], pooling_params=PoolingParams())
