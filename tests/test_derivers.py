"""Scalars derived from containers: the same values, and every pass that is defined."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_gpt2 import tiny_gpt2

from actstore.ingest.model import load_model
from actstore.prompt import Prompt
from actstore.query.derived.config import DstConfig
from actstore.query.derivers import ScalarDeriver, derive_from_raw, values_of
from actstore.query.raw_store import RawActivationStore
from actstore.store.errors import InvalidInput
from actstore.store.vocabulary import ActivationLocationType, PassType

L = ActivationLocationType


@pytest.fixture(scope="module")
def prompt() -> Prompt:
    loaded = load_model((tiny_gpt2(seed=1, dtype=torch.float64), None))
    return Prompt(loaded, [3, 1, 4, 1, 5], objective="logit_diff(9, 2)")


def test_a_saved_container_gives_the_same_scalars(prompt: Prompt, tmp_path: Path) -> None:
    prompt.raw_store.save_to_file(tmp_path / "raw.safetensors")
    raw = RawActivationStore.load_from_file(tmp_path / "raw.safetensors")
    values = values_of(raw, prompt._loaded.weights())
    names = ("mlp_write_norm", "unflattened_attn_write_norm", "attn_act_times_grad", "attn_query")
    found = derive_from_raw(values, dict.fromkeys(names, DstConfig()))
    for name in names:
        expected = prompt.derive(name, dtype="float64")
        for layer in range(2):
            given = found[name].activations_by_layer_index[layer].numpy()
            assert np.array_equal(given, expected.layer(layer).numpy())


def test_backward_values_come_where_they_are_defined(prompt: Prompt) -> None:
    config = DstConfig(derive_gradients=True, layer_indices=(1,))
    both = ScalarDeriver.of("attn_qk_probs", config)
    assert both.derivable_pass_types == (PassType.FORWARD, PassType.BACKWARD)
    found = both.derive(prompt.values, PassType.BACKWARD)
    assert list(found.layer_indices) == [1]
    recorded = prompt.values.raw(L.ATTN_QK_PROBS, PassType.BACKWARD, 1).transpose(1, 2)
    assert torch.equal(found.activations_by_layer_index[1], recorded)
    one = ScalarDeriver.of("mlp_write_norm", config)
    assert one.derivable_pass_types == (PassType.FORWARD,)
    with pytest.raises(InvalidInput, match="no backward value"):
        one.derive(prompt.values, PassType.BACKWARD)


def test_a_deriver_names_what_it_needs() -> None:
    deriver = ScalarDeriver.of("attn_act_times_grad_per_sequence_token")
    assert deriver.requires_gradient
    needed = {(source.of, source.pass_type) for source in deriver.required}
    assert needed == {
        (L.ATTN_QK_PROBS, PassType.FORWARD),
        (L.ATTN_QK_PROBS, PassType.BACKWARD),
    }
    assert not ScalarDeriver.of("mlp_write_norm").requires_gradient
    with pytest.raises(InvalidInput, match="names layer 3"):
        ScalarDeriver.of("blocks.3.hook_resid_post")


def test_a_scalar_given_twice_is_refused(prompt: Prompt) -> None:
    twice = [ScalarDeriver.of("mlp_write_norm")] * 2
    with pytest.raises(InvalidInput):
        derive_from_raw(prompt.values, twice)
