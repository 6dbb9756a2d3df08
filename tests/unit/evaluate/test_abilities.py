"""Retrieval, questions and recovery: what counts as right, that every item is asked as it stands, and what is said of nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from apportion.core.errors import InvalidParameter, InvalidRequest
from apportion.core.outputs import CompletionOutput, RequestOutput
from apportion.evaluate.answers import Item, accuracy, ask
from apportion.evaluate.qa import Protocol, normalize, qa_items, qa_report
from apportion.evaluate.recovery import recovery, recovery_report
from apportion.evaluate.retrieval import TASKS, lengths_that_fit, retrieval_items, retrieval_report


@dataclass
class Oracle:
    """Behind the face of an LLM, one who knows: `knows` gives the text of an answer from the text of a prompt."""

    llm: object
    knows: object
    asked: list = field(default_factory=list)

    def __getattr__(self, name):
        return getattr(self.llm, name)

    def generate(self, prompts, params):
        texts = [self.llm.tokenizer.decode(p["prompt_token_ids"], skip_special_tokens=False) for p in prompts]
        self.asked += list(zip(texts, params, strict=True))
        return [
            RequestOutput(str(i), None, [1], [CompletionOutput(0, self.knows(text), [1], finish_reason="stop")])
            for i, text in enumerate(texts)
        ]


def finder(text):
    """Finds a passkey and nothing else."""
    key = text.partition("The pass key is ")[2][:5]
    return f" {key}.\nAnd so" if "What is the pass key?" in text else " nothing"


def test_retrieval_is_counted_by_cell(llm):
    report = retrieval_report(Oracle(llm, finder), lengths=[128, 200], depths=[0.0, 1.0], num_samples=3)
    assert report.metrics["passkey"].value == 1.0 and report.metrics["passkey"].num == 12 and report.metrics["passkey"].low > 0.7
    assert [report.metrics[task].value for task in TASKS[1:]] == [0.0] * 3 and report.metrics["retrieval"].value == 0.25
    assert len(report.cells) == 4 * 2 * 2 and all(cell["num"] == 3 for cell in report.cells)
    assert [cell["value"] for cell in report.cells if cell["task"] == "passkey"] == [1.0] * 4
    assert len(report.samples) == 48 and report.samples[0]["right"] and report.samples[0]["answer"] in report.samples[0]["text"]


def test_a_prompt_ends_where_the_answer_begins_and_has_its_length(llm):
    items = retrieval_items(llm.tokenizer, lengths=[256], depths=[0.5], num_samples=2)
    for item in items:
        text = llm.tokenizer.decode(item.prompt)
        assert 230 < len(item.prompt) <= 256 and item.row["answer"] in text and not text.endswith(" ")
        assert item.is_right(f" {item.row['answer']}\n") and not item.is_right(f" {item.row['answer']}1") and not item.is_right("")
        assert item.max_tokens >= len(llm.tokenizer.encode(item.row["answer"])) + 1
    again = retrieval_items(llm.tokenizer, lengths=[256], depths=[0.5], num_samples=2)
    other = retrieval_items(llm.tokenizer, lengths=[256], depths=[0.5], num_samples=2, seed=9)
    assert [i.prompt for i in items] == [i.prompt for i in again] != [i.prompt for i in other]


def test_retrieval_through_the_engine(llm):
    """The whole way; the same items cut into other runs get the same answers."""
    items = retrieval_items(llm.tokenizer, tasks=["passkey", "mqar"], lengths=[128], depths=[0.5], num_samples=4)
    answers = ask(llm, items)
    assert [a.text for item in items for a in ask(llm, [item])] == [a.text for a in answers] and all(a.text for a in answers)
    assert accuracy(answers).num == 8


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tasks": ["riddle"]}, "unknown retrieval task 'riddle'"),
        ({"lengths": [100_000]}, "this model takes"),
        ({"lengths": [8]}, "the length is 8"),
        ({"depths": [2.0]}, "depth is 2.0"),
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"filler": "One."}, "at least two sentences"),
    ],
)
def test_grids_that_cannot_be(llm, settings, said):
    with pytest.raises(InvalidParameter, match=said):
        retrieval_report(llm, **{"tasks": ["passkey"], "lengths": [128], "depths": [0.5], "num_samples": 1} | settings)


def test_lengths_are_those_that_fit():
    def model(max_len):
        return SimpleNamespace(engine=SimpleNamespace(models={"m": SimpleNamespace(scheduler=SimpleNamespace(max_model_len=max_len))}))

    assert lengths_that_fit(model(600)) == [128, 256, 512] and lengths_that_fit(model(10**6))[-1] == 4096
    with pytest.raises(InvalidParameter, match="this model takes 100 tokens"):
        lengths_that_fit(model(100))


def test_an_item_that_fails_is_told(llm):
    class Failing(Oracle):
        def generate(self, prompts, params):
            return [RequestOutput("0", None, [1], [CompletionOutput(0, "", [], finish_reason="error", error="out of luck")])]

    with pytest.raises(InvalidRequest, match="out of luck"):
        ask(Failing(llm, finder), [Item("x", [1, 2], 3, bool)])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("The  Cat!", "cat"), ("an apple, a day", "apple day"), (" 1,000.", "1000"), ("Theatre", "theatre"), ("A.", ""), ("É", "é")],
)
def test_normalization(text, expected):
    assert normalize(text) == expected


def test_the_last_match_is_the_answer():
    protocol = Protocol(answer_pattern=r"#### (-?[\d,]+)")
    assert protocol.read("2 + 2 = 4\n#### 3\nno:\n#### 1,004") == "1,004" and protocol.read("none") == ""
    assert Protocol(answer_pattern=r"\d+").read("1 or 22") == "22"
    assert Protocol().read("  one\ntwo") == "one" and Protocol().read("\n") == ""


ENTRIES = [
    {"question": "Capital of France?", "answer": "Paris"},
    {"question": "Two and two?", "answer": ["four", "4"]},
    {"question": "Sky?", "answer": "the blue"},
]


def test_questions_are_put_and_read(llm):
    answers = {"France?": " Paris\n\nQuestion:", "two?": " 4.", "Sky?": " blue green"}
    oracle = Oracle(llm, lambda text: next(a for q, a in answers.items() if q in text.splitlines()[-2]))
    report = qa_report(oracle, ENTRIES)
    assert [sample["right"] for sample in report.samples] == [True, True, False] and report.metrics["exact_match"].num == 3
    prompt, params = oracle.asked[0]
    assert prompt == "Question: Capital of France?\nAnswer:" and params.temperature == 0 and params.stop == ["\n"]


def test_examples_come_first_and_are_not_asked(llm):
    items = qa_items(llm, ENTRIES, Protocol(num_shots=2, template="Q {question} A"))
    assert len(items) == 1 and llm.tokenizer.decode(items[0].prompt) == "Q Capital of France? A Paris\n\nQ Two and two? A four\n\nQ Sky? A"
    [item] = qa_items(llm, ENTRIES, Protocol(num_shots=2, chat=True))
    text = llm.tokenizer.decode(item.prompt, skip_special_tokens=False)
    assert text.count("<|im_start|>user") == 3 and text.count("<|im_start|>assistant") == 3 and item.stop == ()


@pytest.mark.parametrize(
    ("entries", "protocol", "said"),
    [
        ([{"question": "q"}], Protocol(), "entry 1 needs a 'question' and an 'answer'"),
        ([*ENTRIES, {"question": 1, "answer": "x"}], Protocol(), "entry 4 needs"),
        ([{"question": "q", "answer": " the "}], Protocol(), "entry 1 has no answer"),
        (ENTRIES, Protocol(answer_pattern=r"#### (\d+)"), "entry 1 has no answer that the pattern finds"),
        (ENTRIES, Protocol(answer_pattern="("), "is no regular expression"),
        (ENTRIES, Protocol(template="?"), "has no {question}"),
        (ENTRIES, Protocol(num_shots=3), "one at least must be left"),
    ],
)
def test_questions_that_cannot_be_asked(llm, entries, protocol, said):
    with pytest.raises(InvalidParameter, match=said):
        qa_items(llm, entries, protocol)


def test_recovery_is_a_ratio_of_pairs(llm):
    items = retrieval_items(llm.tokenizer, tasks=["passkey", "needle"], lengths=[128], depths=[0.0, 0.5], num_samples=10)
    forgotten = {llm.tokenizer.decode(item.prompt, skip_special_tokens=False) for item in items[:5]}
    original = Oracle(llm, finder)
    worse = Oracle(llm, lambda text: " gone" if text in forgotten else finder(text))
    report = recovery_report(original, worse, items)
    assert report.metrics["recovery"].value == 0.75 == report.metrics["recovery_passkey"].value and report.loss == "score_lost"
    assert report.metrics["score_lost"].value == 0.25 and report.metrics["score_lost"].low == pytest.approx(
        1 - report.metrics["recovery"].high
    )
    assert 0.4 < report.metrics["recovery"].low < 0.75 < report.metrics["recovery"].high <= 1.0  # it can only lose: no pair gains
    assert report.metrics["recovery_needle"].value is None and "needle: the original answers none of 20" in report.notes[0]
    assert report.metrics["score"].value == 15 / 40 and report.metrics["score_original"].value == 20 / 40
    same = recovery_report(original, original, items).metrics["recovery"]
    assert (same.low, same.value, same.high) == (1.0, 1.0, 1.0)


def test_recovery_refuses_answers_to_other_items(llm):
    items = retrieval_items(llm.tokenizer, tasks=["passkey"], lengths=[128], depths=[0.5], num_samples=2)
    answers = ask(Oracle(llm, finder), items)
    with pytest.raises(InvalidParameter, match="the same items"):
        recovery(answers, answers[::-1])
