"""The retrieval tasks: lengths, depths, answers that stand in the text, splits that share no key."""

import re
import subprocess
import sys

import pytest

from apportion.core.errors import InvalidParameter
from apportion.evaluate import tasks

TEXT = " ".join(f"The {n}th day was {'long and ' * (n % 4)}wet, and nobody came to the house." for n in range(40))


@pytest.fixture(scope="module")
def filler() -> tasks.Filler:
    return tasks.Filler(TEXT, lambda text: len(text.split()))


@pytest.mark.parametrize("task", tasks.TASKS)
@pytest.mark.parametrize("length", [128, 512, 2000])
def test_a_sample_fills_its_length_and_holds_its_answer(task, length, filler):
    for seed in range(6):
        sample = tasks.make(task, filler, length=length, depth=seed / 5, seed=seed)
        assert length - 12 <= sample.num_tokens <= length
        assert sample.answer.strip() in sample.context
        assert sample.prompt == sample.context + sample.questions[0][0] and not sample.prompt.endswith(" ")
        assert tasks.make(task, filler, length=length, depth=seed / 5, seed=seed) == sample
        assert tasks.make(task, filler, length=length, depth=seed / 5, seed=seed + 1) != sample


@pytest.mark.parametrize("task", ["passkey", "needle", "multi_needle", "mqar", "copy"])
def test_the_asked_statement_stands_at_the_depth(task, filler):
    for depth in (0.0, 0.25, 0.5, 1.0):
        sample = tasks.make(task, filler, length=1500, depth=depth, seed=3)
        before = len(sample.context.split(sample.answer.strip())[0]) / len(sample.context)
        assert abs(before - depth) < 0.16, (depth, before)


def test_variable_tracking_follows_the_chain(filler):
    for seed in range(8):
        sample = tasks.make("variable_tracking", filler, length=300, depth=0.5, seed=seed, num_questions=2)
        assigned = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", sample.context))
        for question, answer in sample.questions:
            value = question.split()[-2]
            while value in assigned:
                value = assigned[value]
            assert value == answer.strip()


def test_recall_asks_what_the_pairs_say(filler):
    sample = tasks.make("mqar", filler, length=512, depth=0.5, seed=1, num_questions=20)
    pairs = dict(re.findall(r"^(\w+) = (\w+)$", sample.context, re.M))
    assert len(pairs) == 32 and len(sample.questions) == 20
    assert all(pairs[question.split()[0]] == answer.strip() for question, answer in sample.questions)


def test_splits_share_no_word_and_no_number(filler):
    assert not set(tasks.words_of("train")) & set(tasks.words_of("test")) and len(set(tasks._NOUNS)) == len(tasks._NOUNS)
    assert min(len(tasks.words_of(split)) for split in tasks.SPLITS) >= 2 * tasks.MAX_PAIRS

    def keys(split: str) -> set[str]:
        samples = [tasks.make(t, filler, length=256, depth=0.5, seed=s, split=split) for t in tasks.TASKS for s in range(40)]
        return {word for sample in samples for word in sample.answer.split()}

    assert not keys("train") & keys("test")


def test_an_answer_is_exact(filler):
    sample = tasks.make("passkey", filler, length=64, depth=0.5, seed=0)
    assert sample.is_answered_by(sample.answer + ".\nand more") and sample.is_answered_by(sample.answer.strip())
    assert not sample.is_answered_by(sample.answer + "1") and not sample.is_answered_by(" it is" + sample.answer)


def test_what_makes_no_sense_is_refused(filler):
    for wrong, named in (
        ({"task": "riddle"}, "riddle"), ({"split": "dev"}, "dev"), ({"depth": 1.5}, "1.5"), ({"length": 8}, "8"),
        ({"num_questions": 0}, "0"),
    ):  # fmt: skip
        arguments = {"task": "mqar", "length": 256, "depth": 0.5, "seed": 0, **wrong}
        with pytest.raises(InvalidParameter, match=named):
            tasks.make(arguments.pop("task"), filler, **arguments)
    with pytest.raises(InvalidParameter, match="two sentences"):
        tasks.Filler("only one", len)


def test_no_torch():
    code = "import sys; sys.modules['torch'] = None; import apportion.evaluate.tasks"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
