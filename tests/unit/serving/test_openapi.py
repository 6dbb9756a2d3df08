"""Whatever the specification allows, and what it does not, is answered with a status that it declares."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import status_code_conformance

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
    for operation in operations:
        if mode is GenerationMode.POSITIVE or operation.body:  # where nothing can be sent nothing can be wrong
            _try(operation, mode)


def _try(operation, mode):
    @settings(max_examples=20, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case):
        case.call_and_validate(checks=[status_code_conformance])

    run()


def test_the_status_that_is_never_sent_is_not_declared(api):
    for path in api.raw_schema["paths"].values():
        for operation in path.values():
            assert "422" not in operation["responses"]
            assert "503" in operation["responses"]
