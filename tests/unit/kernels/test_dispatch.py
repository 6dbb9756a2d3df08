import logging

import pytest

from apportion.core.errors import Unsupported
from apportion.kernels import dispatch
from apportion.kernels.dispatch import Capability, Implementation, choose, select_ops
from apportion.platforms.null import NullPlatform
from apportion.platforms.platform import select_platform


@pytest.fixture
def known(monkeypatch):
    """Three sets: a fast one that cannot run here, a middling one, and the reference."""
    cpu = Capability(device="cpu")
    table = (
        Implementation("cpu-amx", 3, cpu, lambda share: "amx", unavailable="this processor has no AMX"),
        Implementation("cpu-avx2", 2, cpu, lambda share: "avx2"),
        Implementation("partial", 1, Capability(device="cpu", ops=("linear",)), lambda share: "partial"),
        Implementation("reference", 0, cpu, lambda share: "reference"),
    )
    monkeypatch.setattr(dispatch, "implementations", lambda: table)


def test_auto_takes_the_best_that_runs_and_says_why(known, caplog):
    with caplog.at_level(logging.INFO, "apportion"):
        assert select_ops(select_platform("cpu")) == "avx2"
    assert "cpu-avx2" in caplog.text and "this processor has no AMX" in caplog.text


@pytest.mark.parametrize("prefer, name", [("cpu", "cpu-avx2"), ("reference", "reference"), ("cpu-avx2", "cpu-avx2")])
def test_a_pin_is_kept(known, prefer, name):
    assert choose("cpu", prefer)[0].name == name


@pytest.mark.parametrize(
    "device, prefer, message",
    [
        ("cpu", "cpu-amx", "no AMX"),
        ("cpu", "partial", "it lacks experts, paged_attention"),
        ("cpu", "cuda", "unknown kernels 'cuda'"),
        ("null", "auto", "device 'null'"),
    ],
)
def test_a_choice_that_cannot_run_is_an_error_that_names_the_reason(known, device, prefer, message):
    with pytest.raises(Unsupported, match=message):
        choose(device, prefer)


def test_the_reference_is_always_there():
    assert any(i.name == "reference" and not i.unavailable for i in dispatch.implementations())
    assert select_ops(select_platform(), prefer="reference").name == "reference"
    with pytest.raises(Unsupported):
        select_ops(NullPlatform())
