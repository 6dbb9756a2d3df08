"""`apportion profile` as it is typed: what it prints, the file it leaves, and one sentence for what it cannot take."""

import json

import pytest

from apportion.cli.main import main
from apportion.evaluate import linear_profile
from apportion.kernels import interval_table
from apportion.kernels.cpu import extension

pytestmark = pytest.mark.skipif(not extension.available(), reason="the CPU kernels are not built")


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """An empty folder of dispatch tables, and little to measure."""
    monkeypatch.setattr(interval_table, "files", lambda package: tmp_path)
    monkeypatch.setattr(linear_profile, "COLD_BYTES", 1 << 16)
    return tmp_path / "tables" / "dispatch"


def test_what_was_measured_is_what_is_explained(tables, capsys):
    assert main(["profile", "--explain", "3", "512", "256", "--scheme", "float16"]) == 0
    assert "float16 512 x 256 was not measured" in capsys.readouterr().out
    assert main(["profile", "--linear", "--scheme", "float16", "--rounds", "1", "--num-threads", "1", "-q"]) == 0
    (path,) = tables.iterdir()
    out = capsys.readouterr().out
    assert str(path) in out and "a choice costs at most" in out
    rows = json.loads(path.read_text())["rows"]
    assert {row["scheme"] for row in rows} == {"float16"} and all({"flat", "library"} <= set(row["us"]["1"]) for row in rows)
    assert main(["profile", "--explain", "3", str(rows[0]["n"]), str(rows[0]["c"]), "--scheme", "float16"]) == 0
    assert "measured at 3 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--explain", "0", "64", "64"], "--explain takes numbers from 1 on, got 0"),
        (["--linear", "--rounds", "0"], "--rounds takes numbers from 1 on, got 0"),
        (["--linear", "--num-threads", "-1"], "--num-threads takes numbers from 1 on, got -1"),
        (["--softmax", "--num-tokens", "0"], "--num-tokens takes numbers from 1 on, got 0"),
        (["--explain", "1", "64", "64", "--scheme", "nonsense"], "nonsense"),
        (["--linear", "/nowhere"], "no folder '/nowhere'"),
    ],
)
def test_what_it_cannot_take_is_one_sentence(arguments, sentence, capsys):
    assert main(["profile", *arguments]) != 0
    err = capsys.readouterr().err
    assert sentence in err and len(err.strip().splitlines()) == 1
