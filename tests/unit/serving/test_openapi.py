"""Whatever the specification allows, and what it does not, is answered with a status that it declares."""

from collections import Counter

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import status_code_conformance

EXAMPLES = 40  # of each operation, and of each way to go about it
SKIPPED = {"/v1/models/load", "/v1/models/unload"}  # they would take the model away from the others


@pytest.fixture(scope="module")
def api(start_server):
    """Short answers only."""
    server = start_server("--max-model-len", "64", "--max-body-bytes", "100k")
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_every_answer_is_declared(api, mode):
    operations = [found.ok() for found in api.get_all_operations() if found.ok().path not in SKIPPED]
    assert len(operations) > 8
    taken = 0
    for operation in operations:
        if mode is GenerationMode.POSITIVE or operation.body:  # where nothing can be sent nothing can be wrong
            answered = _try(operation, mode)
            taken += answered[200] if operation.body else 0
            assert mode is GenerationMode.POSITIVE or answered[400], operation.path
    assert mode is GenerationMode.NEGATIVE or taken > 20  # not all is refused, so that more than refusing is tried


def _try(operation, mode) -> Counter:
    """How many cases were answered with which status."""
    answered: Counter = Counter()

    @settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode), kept=st.lists(st.integers(0, 1000), max_size=3))
    def run(case, kept):
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body = _thinned(case.body, operation, kept)
        answered[case.call_and_validate(checks=[status_code_conformance]).status_code] += 1

    run()
    return answered


def _thinned(body: dict, operation, kept: list[int]) -> dict:
    """With few of the fields that could be left out: all at once contradict each other, and nothing would come through."""
    name = operation.definition.raw["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    needed = operation.schema.raw_schema["components"]["schemas"][name].get("required", ["prompt"])  # /tokenize: that, or messages
    optional = sorted(body.keys() - {*needed, "model"})
    shown = {optional[i % len(optional)] for i in kept if optional}
    return {name: value for name, value in body.items() if name in shown or name in needed}


def test_the_status_that_is_never_sent_is_not_declared(api):
    for path in api.raw_schema["paths"].values():
        for operation in path.values():
            assert "422" not in operation["responses"]
            assert "503" in operation["responses"]
