"""A plan's record: whatever stands in its place is refused, and never half believed."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.store.blobs import LocalBlobs
from actstore.store.errors import ErrorKind, NotAStore, StoreDamaged
from actstore.store.plan_record import PlanConfig, PlanRecord
from actstore.store.planning import build_plan
from actstore.store.records import decode_record, encode_record
from actstore.store.token_stream import TokenizedDocument

_JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """The path of a plan's record, and its fields."""
    root = tmp_path_factory.mktemp("plan")
    config = PlanConfig(context=16, vocabulary_size=64, segment_rows=512, batch_tokens=96)
    documents = [TokenizedDocument(np.arange(40, dtype=np.int32), "text", {})]
    plan = build_plan(LocalBlobs(root), config, documents, [], append=False).plans[0]
    return plan.record_path, decode_record((root / plan.record_path).read_bytes(), plan.record_path)


def members(fields: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all that a JSON value holds."""
    inner = (
        fields.items()
        if isinstance(fields, dict)
        else enumerate(fields)
        if isinstance(fields, list)
        else ()
    )
    return [path] * bool(path) + [
        below for key, value in inner for below in members(value, (*path, key))
    ]


def mangled(fields: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value at ``path``."""
    if not path:
        return value
    copy = dict(fields) if isinstance(fields, dict) else list(fields)
    copy[path[0]] = mangled(fields[path[0]], path[1:], value)
    return copy


def outcome(data: bytes, name: str) -> PlanRecord | StoreDamaged | NotAStore:
    """The record, or the error; any other error fails the test."""
    try:
        return PlanRecord.decode(data, name)
    except (StoreDamaged, NotAStore) as error:
        return error


def test_the_record_itself_is_read(made: tuple[str, dict[str, Any]]) -> None:
    name, fields = made
    assert PlanRecord.decode(encode_record(fields), name).folder == name.rpartition("/")[0]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_mangled_record_is_refused(made: tuple[str, dict[str, Any]], data: st.DataObject) -> None:
    """Its checksum holds: another writer, or another version, might have written it."""
    name, fields = made
    path = data.draw(st.sampled_from(members(fields)))
    value = data.draw(_JSON)
    changed = mangled(fields, path, value)
    found = outcome(encode_record(changed), name)
    if isinstance(found, StoreDamaged):
        assert found.kind is ErrorKind.MALFORMED_FILE
        assert name in str(found)
    elif isinstance(found, NotAStore):
        assert found.kind is ErrorKind.NEWER_FORMAT
        assert path == ("format",)
    else:
        # What the plan fixes is under its hash; sizes and checksums of files are not.
        assert found.hash == fields["hash"]
        # An empty list may be written as another empty thing; the record is the same.
        original = PlanRecord.decode(encode_record(fields), name)
        assert path[0] in ("files", "format") or found == original


@pytest.mark.parametrize(
    ("member", "value"), [("files", [1]), ("files", [[]]), ("config", []), ("chain", 7)]
)
def test_members_of_another_shape_are_damage(
    made: tuple[str, dict[str, Any]], member: str, value: object
) -> None:
    name, fields = made
    with pytest.raises(StoreDamaged) as caught:
        PlanRecord.decode(encode_record({**fields, member: value}), name)
    assert caught.value.kind is ErrorKind.MALFORMED_FILE


@pytest.mark.parametrize("member", ["number", "config", "counts", "chain", "files", "hash"])
def test_a_missing_member_is_damage(made: tuple[str, dict[str, Any]], member: str) -> None:
    name, fields = made
    rest = {key: value for key, value in fields.items() if key != member}
    with pytest.raises(StoreDamaged, match=name):
        PlanRecord.decode(encode_record(rest), name)
