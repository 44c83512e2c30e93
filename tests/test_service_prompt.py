"""A text that is typed: the service says of it what a prompt says in Python."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from served import client_of, make_store
from tiny_gpt2 import tiny_gpt2

from actstore.ingest.model import LoadedModel, load_model
from actstore.prompt import Prompt
from actstore.query.service.models import PromptModel
from actstore.query.service.settings import ServerSettings
from actstore.store.nodes import NodeIndex
from actstore.store.vocabulary import NodeType

ADDRESS = "/api/v1/prompt"
TEXT = "3 5 7 11 5"
OBJECTIVE = "next_token_log_prob"


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model((tiny_gpt2(), None))


def run_of(loaded: LoadedModel, objective: str | None = OBJECTIVE) -> Any:
    """Runs a text of numbers: the tiny model has no tokenizer."""
    return lambda text: Prompt(
        loaded, [int(number) for number in text.split()], objective=objective
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("served") / "store")


@pytest.fixture(scope="module")
def client(path: Path, loaded: LoadedModel) -> Iterator[TestClient]:
    with client_of(path, prompt=run_of(loaded)) as found:
        yield found


def asked(client: TestClient, **body: Any) -> dict[str, Any]:
    answer = client.post(ADDRESS, json={"text": TEXT, **body})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    PromptModel.model_validate(found)
    return found


def test_the_strongest_nodes_of_a_text(client: TestClient, loaded: LoadedModel) -> None:
    found = asked(client, top=5)
    expected = run_of(loaded)(TEXT)
    assert found["token_ids"] == [3, 5, 7, 11, 5]
    assert found["objective_value"] == expected.objective_value
    names = ["mlp_write_norm", "attn_write_norm", "mlp_act_times_grad", "attn_act_times_grad"]
    assert [one["scalar"] for one in found["top"]] == names
    for one in found["top"]:
        tensor = expected.derive(one["scalar"])
        values = tensor.numpy()
        sizes = np.sort(np.abs(values[~np.isnan(values)]))[::-1][:5]
        assert [abs(row["value"]) for row in one["rows"]] == sizes.tolist()
        for row in one["rows"]:
            if tensor.attended is None:
                place = (row["layer"], row["token"], row["neuron"])
            else:
                here = (tensor.rows.position == row["token"]) & (tensor.attended == row["attended"])
                place = (row["layer"], int(np.flatnonzero(here)[0]), row["head"])
            assert values[place] == row["value"]


def test_whole_tensors_of_some_layers(client: TestClient, loaded: LoadedModel) -> None:
    found = asked(client, scalars=["mlp_post_act"], layers=[1], values=True, top=1)
    expected = run_of(loaded)(TEXT).derive("mlp_post_act", layers=[1])
    tensor = found["tensors"]["mlp_post_act"]
    assert tensor["dims"] == list(expected.dims)
    assert (np.array(tensor["values"], np.float32) == expected.numpy()).all()


def test_the_parts_of_a_logit(client: TestClient, loaded: LoadedModel) -> None:
    found = asked(client, target=9, against=2, top=1000)["attribution"]
    cache = run_of(loaded)(TEXT).cache()
    expected = cache.direct_logit_attribution(9, 2).to_arrow().column("value").to_pylist()
    assert sorted(row["value"] for row in found) == pytest.approx(sorted(expected))
    assert all(row["position"] == 4 for row in found)


def test_what_nodes_write_and_read(client: TestClient, loaded: LoadedModel) -> None:
    nodes = [
        {"type": "mlp_neuron", "layer": 1, "indices": [2, 7]},
        {"type": "attention_head", "layer": 0, "indices": [3, 1, 1]},
    ]
    found = asked(client, nodes=nodes, tokens=4)
    kinds = [(one["node"]["type"], one["kind"]) for one in found["vectors"]]
    assert kinds == [
        ("mlp_neuron", "token_write"),
        ("mlp_neuron", "token_read"),
        ("attention_head", "token_write"),
    ]
    # A whole head reads nothing; the answer says so and gives the rest.
    assert any(note.startswith("token_read") for note in found["notes"])
    node = NodeIndex(NodeType.MLP_NEURON, (2, 7), 1)
    vector = run_of(loaded)(TEXT).postprocess("token_write", node).numpy()
    promoted = found["vectors"][0]["promoted"]
    assert [one["token_id"] for one in promoted] == np.argsort(-vector)[:4].tolist()
    assert [one["value"] for one in promoted] == vector[np.argsort(-vector)[:4]].tolist()
    suppressed = found["vectors"][0]["suppressed"]
    assert [one["token_id"] for one in suppressed] == np.argsort(vector)[:4].tolist()


def test_what_a_pass_lacks_is_a_note(path: Path, loaded: LoadedModel) -> None:
    with client_of(path, prompt=run_of(loaded, None)) as found:
        answer = asked(found, scalars=["mlp_write_norm", "mlp_act_times_grad"])
    assert [one["scalar"] for one in answer["top"]] == ["mlp_write_norm"]
    assert [note.partition(":")[0] for note in answer["notes"]] == ["mlp_act_times_grad"]
    assert answer["objective_value"] is None


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ({"text": ""}, 422, "invalid_argument"),
        ({}, 422, "invalid_argument"),
        ({"text": TEXT, "colour": 1}, 422, "invalid_argument"),
        ({"text": TEXT, "scalars": ["nothing"]}, 404, "unknown_scalar"),
        ({"text": TEXT, "layers": [7]}, 404, "unknown_layer"),
        ({"text": TEXT, "nodes": [{"type": "cat", "indices": [1]}]}, 422, "invalid_argument"),
        ({"text": TEXT, "target": 99999}, 422, "token_out_of_vocabulary"),
        ({"text": "1 " * 60}, 422, "invalid_argument"),
        ({"text": "1 " * 300}, 413, "too_large"),
    ],
)
def test_texts_that_are_refused(
    path: Path, loaded: LoadedModel, body: dict[str, Any], status: int, kind: str
) -> None:
    settings = ServerSettings(max_text_characters=400)
    with client_of(path, settings, prompt=run_of(loaded)) as found:
        answer = found.post(ADDRESS, json=body)
        assert (answer.status_code, answer.json()["kind"]) == (status, kind), answer.text
        assert found.get(ADDRESS).status_code == 405
        assert found.get("/api/v1").json()["resources"]["prompt"] == ADDRESS
