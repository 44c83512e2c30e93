"""Names of activations and slices of axes, without any model."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actstore.query.cache.anatomy import Anatomy
from actstore.query.cache.names import UnknownHook, full_name, split_name
from actstore.query.cache.selections import pick
from actstore.store.errors import ErrorKind, InvalidInput

PLAIN = Anatomy(
    n_layers=3,
    centres=True,
    has_position_embedding=True,
    is_rotary=False,
    is_parallel=False,
    is_gated=False,
    has_query_key_norms=False,
    has_post_norms=False,
)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("embed", "hook_embed"),
        (("embed",), "hook_embed"),
        (("embed", None), "hook_embed"),
        ("logits", "logits"),
        ("k0", "blocks.0.attn.hook_k"),
        ("attn1", "blocks.1.attn.hook_pattern"),
        ("key0", "blocks.0.attn.hook_k"),
        ("attn_scores0", "blocks.0.attn.hook_attn_scores"),
        ("attn_logits0", "blocks.0.attn.hook_attn_scores"),
        ("mlp_pre0", "blocks.0.mlp.hook_pre"),
        ("mlp_post1", "blocks.1.mlp.hook_post"),
        ("pre_linear2", "blocks.2.mlp.hook_pre_linear"),
        ("rot_q1", "blocks.1.attn.hook_rot_q"),
        ("attn_out2", "blocks.2.hook_attn_out"),
        ("resid_pre0", "blocks.0.hook_resid_pre"),
        ("scale0ln1", "blocks.0.ln1.hook_scale"),
        ("normalized2ln2", "blocks.2.ln2.hook_normalized"),
        ("post1m", "blocks.1.mlp.hook_post"),
        ("scale", "ln_final.hook_scale"),
        (("normalized", None), "ln_final.hook_normalized"),
        (("resid_post", -1), "blocks.2.hook_resid_post"),
        (("resid_post", np.int64(-3)), "blocks.0.hook_resid_post"),
        (("hook_q", 2), "blocks.2.attn.hook_q"),
        (("q", 1, "mlp"), "blocks.1.attn.hook_q"),
        (("scale", 1, "attn.q_norm"), "blocks.1.attn.q_norm.hook_scale"),
        (("resid_mid", 1, "blocks"), "blocks.1.hook_resid_mid"),
        ("blocks.1.attn.hook_z", "blocks.1.attn.hook_z"),
    ],
)
def test_keys_stand_for_full_names(key: Any, name: str) -> None:
    assert full_name(key, 3) == name


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("resid_pre3", ErrorKind.UNKNOWN_LAYER),
        (("resid_pre", -4), ErrorKind.UNKNOWN_LAYER),
        ("blocks.7.hook_resid_pre", ErrorKind.UNKNOWN_LAYER),
        (("q", True), ErrorKind.UNKNOWN_LOCATION),
        (("q", 1.5), ErrorKind.UNKNOWN_LOCATION),
        (3, ErrorKind.UNKNOWN_LOCATION),
        ((), ErrorKind.UNKNOWN_LOCATION),
        ((1, "q"), ErrorKind.UNKNOWN_LOCATION),
    ],
)
def test_a_wrong_key_is_a_missing_one_and_says_so(key: Any, kind: ErrorKind) -> None:
    with pytest.raises(UnknownHook) as caught:
        full_name(key, 3)
    assert caught.value.kind is kind
    assert isinstance(caught.value, KeyError)
    assert isinstance(caught.value, InvalidInput)
    assert not str(caught.value).startswith("'\"")
    assert str(caught.value).endswith(".")


def test_every_hook_has_its_own_name_back() -> None:
    for name in PLAIN.hooks():
        assert full_name(name, 3) == name
        assert PLAIN.has(name)
        layer, rest = split_name(name)
        if layer is not None:
            *sublayer, short = rest.split(".")
            key = (short.removeprefix("hook_"), layer, ".".join(sublayer) or None)
            assert full_name(key, 3) == name


def test_what_a_model_lacks_is_not_there() -> None:
    assert len(list(PLAIN.hooks())) == 55
    for absent in ("attn.hook_rot_q", "mlp.hook_pre_linear", "ln1_post.hook_scale"):
        assert not PLAIN.has(f"blocks.0.{absent}")
    assert not PLAIN.has("blocks.3.hook_resid_post")
    assert PLAIN.has("blocks.2.attn.hook_result")
    assert PLAIN.has("logits")


@given(
    length=st.integers(1, 12),
    bounds=st.tuples(*[st.none() | st.integers(-15, 15)] * 2),
    step=st.none() | st.integers(1, 4),
)
def test_a_slice_and_its_arguments_pick_what_python_picks(
    length: int, bounds: tuple[int | None, int | None], step: int | None
) -> None:
    expected = list(range(length))[slice(*bounds, step)]
    for given_slice in (slice(*bounds, step), (*bounds, step)):
        found = pick(given_slice, length, "position")
        assert found.indices.tolist() == expected
        assert not found.drops_axis


@given(length=st.integers(1, 12), place=st.integers(-14, 14))
def test_a_number_drops_the_axis_and_a_list_keeps_it(length: int, place: int) -> None:
    numbers = [place, np.int64(place), torch.tensor(place), np.array(place)]
    if not -length <= place < length:
        for one in (*numbers, [place]):
            with pytest.raises(InvalidInput, match=f"no position {place}"):
                pick(one, length, "position")
        return
    for one in numbers:
        assert pick(one, length, "position").drops_axis
    for several in ([place], np.array([place]), torch.tensor([place])):
        found = pick(several, length, "position")
        assert found.indices.tolist() == [range(length)[place]]
        assert not found.drops_axis


@pytest.mark.parametrize("wrong", [True, 1.5, "all", [[0]], [True], (1, 2, 3, 4), (), (0.5,), {}])
def test_what_is_no_slice_is_refused(wrong: Any) -> None:
    with pytest.raises(InvalidInput):
        pick(wrong, 5, "position")


def test_an_empty_list_picks_nothing() -> None:
    assert pick([], 5, "position").indices.tolist() == []
    assert pick((1,), 5, "position").indices.tolist() == [0]
