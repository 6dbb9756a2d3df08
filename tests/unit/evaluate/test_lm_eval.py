"""EleutherAI's lm-eval over the server's /v1/completions: its log-likelihoods are the engine's, on tasks that need no network."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from apportion.evaluate.likelihood import nll
from tests.unit.serving.conftest import start_server  # noqa: F401 (a fixture)

pytest.importorskip("lm_eval", reason="needs lm-eval, of the extra [dev]")
pytest.importorskip("openai", reason="the server's fixtures need openai, of the extra [dev]")

QUESTIONS = [
    ("Uncle Henry sat upon the doorstep and looked", [" anxiously at the sky.", " purple seven of under."], 0),
    ("Dorothy lived in the midst of the great", [" prairies of Kansas.", " prairies", " of of of of"], 1),
    ("The capital of France is", [" Paris", " the"], 0),
]
TEXTS = ["The little girl laughed, and the dog ran round and round the house. " * 40, "A short one."]
MAX_LENGTH = 256
COMMON = "dataset_path: json\ntest_split: test\nmetadata: {version: 1}\n"
TASKS = {
    "local_choice": "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: '{{answer}}'\n"
    "target_delimiter: ''\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n",
    "local_rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n",
    "local_until": "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: 'x'\n"
    'generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false, temperature: 0}\nmetric_list: [{metric: exact_match}]\n',
}


@pytest.fixture(scope="module")
def samples(start_server, bundled_model, tmp_path_factory):  # noqa: F811
    """What lm-eval logs of each task, by task: a list of rows."""
    folder = tmp_path_factory.mktemp("lm-eval")
    rows = [{"question": q, "choices": choices, "answer": answer} for q, choices, answer in QUESTIONS]
    for name, task in TASKS.items():
        data = [{"text": text} for text in TEXTS] if name == "local_rolling" else rows
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
        files = f"dataset_kwargs: {{data_files: {{test: {folder / f'{name}.jsonl'}}}}}\n"
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{COMMON}{files}{task}")
    server = start_server(str(bundled_model), "--dtype", "float32", "--kv-cache-memory", "64MiB", "--served-model-name", "dense")
    arguments = (
        f"model=dense,base_url={server.url}/v1/completions,tokenizer={bundled_model},tokenizer_backend=huggingface,max_length={MAX_LENGTH}"
    )
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", arguments, "--tasks", ",".join(TASKS)]
    command += ["--include_path", str(folder), "--output_path", str(folder / "out"), "--log_samples", "--batch_size", "4"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home"), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for path in (folder / "out").rglob("samples_*.jsonl"):
        name = next(name for name in TASKS if name in path.name)
        found[name] = sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda row: row["doc_id"])
    assert found.keys() == TASKS.keys(), done.stdout
    return found


def test_choices_have_the_engines_likelihoods(samples, llm):
    """Each (sum of log-probabilities, whether greedy would say it) from ids as lm-eval cuts them; the most likely one is its answer."""
    for row, (question, choices, answer) in zip(samples["local_choice"], QUESTIONS, strict=True):
        expected = []
        for choice in choices:
            ids, context = llm.tokenizer.encode(question + choice), llm.tokenizer.encode(question)
            expected.append(-nll(llm, [ids])[0][len(context) - 1 :].sum())
        said = [float(response[0][0]) for response in row["resps"]]
        assert said == pytest.approx(expected, abs=1e-3)
        assert row["acc"] == float(max(range(len(choices)), key=expected.__getitem__) == answer)


def test_rolling_windows_cover_a_long_text(samples, llm):
    """From the end-of-text token on, in windows that lm-eval cuts: a last one goes back for context. The numbers are the engine's."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    for row, text in zip(samples["local_rolling"], TEXTS, strict=True):
        ids = llm.tokenizer.encode(text)
        assert (len(ids) > 2 * MAX_LENGTH) == (text == TEXTS[0])
        cut = get_rolling_token_windows(ids, prefix_token=llm.tokenizer.eos_token_id, max_seq_len=MAX_LENGTH - 2, context_len=1)
        windows = [make_disjoint_window(window) for window in cut]
        losses = nll(llm, [[*context, *scored] for context, scored in windows])
        expected = -sum(each[len(context) - 1 :].sum() for each, (context, _) in zip(losses, windows, strict=True))
        assert float(row["filtered_resps"][0]) == pytest.approx(expected, abs=1e-2) and expected < -10


def test_text_is_generated_up_to_a_stop(samples, llm):
    from apportion import SamplingParams

    for row, (question, _, _) in zip(samples["local_until"], QUESTIONS, strict=True):
        [output] = llm.generate(question, SamplingParams(temperature=0, max_tokens=8, stop=["\n"]))
        assert row["resps"][0][0] == output.outputs[0].text
