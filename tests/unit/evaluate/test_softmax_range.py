"""Unified maxima from text: the window that holds most rows, heads without one, the table's way into an engine and its counter."""

import json
import math
from dataclasses import replace

import pytest
import torch

from apportion.assets import PASSAGE
from apportion.core.errors import InvalidParameter
from apportion.core.sampling_params import SamplingParams
from apportion.core.softmax_table import ABOVE, BELOW, SoftmaxTable
from apportion.evaluate.softmax_range import RowMaxima, profile_softmax
from apportion.llm import LLM
from apportion.quantization import calibration_tokens


def chosen(*heads):
    maxima = RowMaxima(len(heads))
    maxima.add(torch.tensor(heads).T)
    return maxima.choose()


def test_phi_puts_all_rows_into_the_window():
    (near, far), expected = chosen([-3.5, 2.5, 10.2], [500.0, 540.5, 560.1])
    for phi, low, high in ((near, -4, 11), (far, 500, 561)):
        assert low - phi >= -BELOW and high - phi <= ABOVE
    assert expected == (0.0, 0.0)


def test_a_head_that_spreads_too_far_has_none():
    spread = [float(x) for x in range(0, 400, 2)]
    mostly = [0.0] * 995 + [1000.0] * 5
    (none, some), (bad, good) = chosen(spread + [0.0] * 800, mostly)
    assert none is None and bad == pytest.approx(0.15, abs=0.03)
    assert some is not None and good == pytest.approx(0.005)


@pytest.fixture(scope="module")
def table(bundled_model):
    return profile_softmax(bundled_model, calibration_tokens(str(bundled_model), PASSAGE, 2, 256))


@pytest.fixture(scope="module")
def bundled_model():
    from apportion.assets import DEFAULT_MODEL

    return DEFAULT_MODEL


def generated(**engine):
    with LLM(max_model_len=256, kv_cache_memory=64 << 20, device="cpu", num_threads=1, **engine) as llm:
        [output] = llm.generate(["Once upon a time"], SamplingParams(max_tokens=24, temperature=0.0))
        [metrics] = llm.engine.metrics().values()
        return output.outputs[0].token_ids, metrics.softmax_rows_recomputed


def test_a_table_of_text_gives_the_same_tokens_and_recomputes_nothing(table, tmp_path):
    path = tmp_path / "softmax.json"
    table.write(path)
    assert SoftmaxTable.read(path) == table and table.num_enabled == table.num_heads > 0
    tokens, recomputed = generated(softmax_table=str(path))
    assert tokens == generated()[0] and recomputed == 0


def test_rows_out_of_range_are_counted_and_right(table, tmp_path):
    path = tmp_path / "far.json"
    replace(table, phi={layer: tuple(900.0 for _ in heads) for layer, heads in table.phi.items()}).write(path)
    tokens, recomputed = generated(softmax_table=str(path))
    expected, none = generated()
    assert tokens == expected and none == 0
    assert recomputed > 24 * table.num_heads, "every row of every head"


def test_tables_of_other_models_and_no_tables_are_refused(table, tmp_path):
    path = tmp_path / "softmax.json"
    replace(table, model_hash="0" * 32).write(path)
    with pytest.raises(InvalidParameter, match="measured on another model; measure this one with `apportion profile --softmax`"):
        generated(softmax_table=str(path))
    with pytest.raises(InvalidParameter, match="no table of unified maxima"):
        generated(softmax_table=str(tmp_path / "absent.json"))
    table.write(path)
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "format": "other"}))
    with pytest.raises(InvalidParameter, match="has the format 'other'"):
        SoftmaxTable.read(path)
    data["layers"][0]["phi"][0] = math.inf
    path.write_text(json.dumps(data))
    with pytest.raises(InvalidParameter, match="finite number"):
        SoftmaxTable.read(path)


def test_sequences_do_not_see_each_other(bundled_model):
    """Where one is measured alone or beside another, a head's window holds the same rows."""
    rows = calibration_tokens(str(bundled_model), PASSAGE, 2, 100)
    both, alone = profile_softmax(bundled_model, rows), [profile_softmax(bundled_model, [row]) for row in rows]
    for layer, heads in both.phi.items():
        for head, phi in enumerate(heads):
            assert min(t.phi[layer][head] for t in alone) <= phi <= max(t.phi[layer][head] for t in alone)


def test_no_text_is_refused(bundled_model):
    with pytest.raises(InvalidParameter, match="there is none"):
        profile_softmax(bundled_model, [])
