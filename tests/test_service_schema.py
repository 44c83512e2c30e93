"""The OpenAPI schema: what it says is true of every answer, and no question breaks the server."""

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import positive_data_acceptance
from served import NEURONS, client_of, make_store

from actstore.query.derived import SCALARS
from actstore.query.examples import examples
from actstore.query.questions import QuestionOptions
from actstore.query.service.problems import STATUSES
from actstore.query.service.resources import PROBLEMS
from actstore.query.thresholds import ThresholdOptions

EXAMPLES = 20
"""Questions of each resource; the whole takes some ten seconds."""

HOST = {"Host": "127.0.0.1"}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    path = make_store(tmp_path_factory.mktemp("served") / "store")
    # A traceback would be the schema's concern as much as the client's.
    with client_of(Path(path), raise_server_exceptions=True) as found:
        yield found


@pytest.fixture(scope="module")
def schema(client: TestClient) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/openapi.json").json()
    return found


def test_every_resource_documents_its_errors(schema: dict[str, Any]) -> None:
    assert schema["openapi"].startswith("3.1")
    operations = [one for path in schema["paths"].values() for one in path.values()]
    assert len(operations) >= 24
    for operation in operations:
        for status in PROBLEMS:
            content = operation["responses"][str(status)]["content"]
            assert content == {
                "application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}
            }
        assert operation["responses"]["200"]["content"]["application/json"]["schema"]
    assert "HTTPValidationError" not in json.dumps(schema)


SAME = {
    "layers": "layer",
    "neurons": "neuron",
    "heads": "head",
    "latents": "latent",
    "channels": "channel",
    "tokens": "token",
    "window": "before",
}
"""Options of the Python calls that have another name as keys, which repeat."""


@pytest.mark.parametrize(
    ("path", "options"),
    [
        ("/topk/{name}", {*QuestionOptions.__annotations__, "max_cells"}),
        ("/explain/{name}", {*QuestionOptions.__annotations__}),
        ("/compare", {*QuestionOptions.__annotations__, "max_cells"}),
        ("/filter/{name}", {*ThresholdOptions.__annotations__, "limit"}),
        ("/count/{name}", {*ThresholdOptions.__annotations__}),
        ("/examples/{name}", {*inspect.signature(examples).parameters} - {"store"}),
    ],
)
def test_every_option_of_a_call_is_a_key(
    schema: dict[str, Any], path: str, options: set[str]
) -> None:
    keys = {one["name"] for one in schema["paths"][f"/api/v1{path}"]["get"]["parameters"]}
    assert {SAME.get(name, name) for name in options} <= keys


def test_scalars_are_named(schema: dict[str, Any]) -> None:
    parameters = schema["paths"]["/api/v1/topk/{name}"]["get"]["parameters"]
    found = next(one for one in parameters if one["name"] == "name")
    assert found["schema"]["enum"] == list(SCALARS)


def test_no_question_breaks_the_server(client: TestClient) -> None:
    read: Any = schemathesis.openapi.from_asgi("/openapi.json", client.app, headers=HOST)
    seen: dict[str, set[int]] = {}
    for result in read.get_all_operations():
        operation = result.ok()
        name = f"{operation.method} {operation.path}"
        seen[name] = _ask(operation)
    assert len(seen) >= 24
    assert {200, 404, 413, 422} <= set().union(*seen.values())
    # What takes no free text must not only refuse.
    for name in ("/store", "/neurons/{layer}/{unit}", "/topk/{name}", "/scalars/{name}"):
        assert 200 in seen[f"get /api/v1{name}"], name


def _ask(operation: Any) -> set[int]:
    statuses: set[int] = set()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(), lands=st.booleans())
    def ask(case: Any, lands: bool) -> None:
        if lands:
            _land(case)
        answer = case.call(headers=HOST)
        statuses.add(answer.status_code)
        assert answer.status_code < 500, answer.text
        # Any text fits the schema of a predicate or a cursor, and few texts are one.
        case.validate_response(answer, excluded_checks=[positive_data_acceptance])

    ask()
    return statuses


def _land(case: Any) -> None:
    """Turn far-off numbers into some that this store has."""
    sizes = {"layer": 2, "unit": NEURONS, "sequence": 6, "token": 500, "head": 2}
    for given_values in (case.path_parameters or {}, case.query or {}):
        for name, size in sizes.items():
            value = given_values.get(name)
            if isinstance(value, int):
                given_values[name] = value % size
            elif isinstance(value, list):
                given_values[name] = [one % size for one in value if isinstance(one, int)][:3]
    query = case.query or {}
    for name in ("cursor", "where", "units", "sort", "per"):
        query.pop(name, None)
    for name in ("k", "limit", "max_cells"):
        if isinstance(query.get(name), int):
            query[name] = 1 + query[name] % 20
    if "scalar" in query:
        query["scalar"] = "mlp_write_norm"
    if "unit" in query and isinstance(query["unit"], str):
        query["unit"] = "1:2"
    if case.path_parameters and "location" in case.path_parameters:
        case.path_parameters["location"] = "resid_post_mlp"


def test_the_docs_name_every_resource_and_every_kind(schema: dict[str, Any]) -> None:
    text = (Path(__file__).parent.parent / "docs" / "service.md").read_text()
    missing = [path for path in schema["paths"] if f"`{path}`" not in text]
    # Heads and latents are documented beside the neurons.
    assert missing == [
        "/api/v1/heads/{layer}/{unit}/examples",
        "/api/v1/latents/{layer}/{unit}/examples",
    ]
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line[:3] == "| 4"}
    rows |= {line.split("|")[1].strip(): line for line in text.splitlines() if line[:3] == "| 5"}
    for kind, status in STATUSES.items():
        assert f"`{kind}`" in rows[str(status.value)], kind
