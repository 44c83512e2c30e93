"""Values and gradients of a pass set to constants."""

from typing import Any

import numpy as np
import pytest
import torch
from passes import (
    ablate,
    assert_close,
    both_kinds,
    random_ids,
)
from tiny_gpt2 import LOCATIONS, tiny_gpt2

from actstore.ingest.live_pass import LivePass, run_pass
from actstore.ingest.model import LoadedModel, load_model
from actstore.ingest.objectives import (
    LogitDiff,
    NextTokenLogProb,
)
from actstore.store.nodes import (
    AttentionTraceType,
    PreOrPostAct,
)
from actstore.store.vocabulary import (
    ActivationLocationType,
    NodeType,
    PassType,
)

L = ActivationLocationType
N = NodeType
FORWARD, BACKWARD = PassType.FORWARD, PassType.BACKWARD
PRE, POST = PreOrPostAct.PRE, PreOrPostAct.POST
V = AttentionTraceType.V
LOGIT_DIFF = LogitDiff((5, 40), (9, 61, 70))


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model((tiny_gpt2(dtype=torch.float64), None))


PROBED = [
    (location, 0 if location.has_layers else None)
    for location in (
        *LOCATIONS,
        L.ONLINE_MLP_AUTOENCODER_LATENT,
        L.ONLINE_MLP_AUTOENCODER_ERROR,
    )
]


def probed_indices(location: L, layer: int | None, found: LivePass) -> list[tuple[int, ...]]:
    """Two places of a location where its gradient is not small, in the order of an index."""
    gradient = found.values[location, BACKWARD, layer].abs()
    if location.is_pair_shaped:  # tokens attend to no later ones, so those cannot be ablated
        gradient = gradient.transpose(0, 1).tril().transpose(0, 1)
    places = []
    for flat in gradient.flatten().topk(3).indices[[0, 2]].tolist():
        at = [int(axis) for axis in np.unravel_index(flat, gradient.shape)]
        places.append((at[0], at[2], at[1]) if location.is_pair_shaped else tuple(at))
    return places


def value_at(location: L, index: tuple[int, ...], tensor: torch.Tensor) -> float:
    token, *rest = index
    return float(tensor[(token, *(reversed(rest) if location.is_pair_shaped else rest))])


@pytest.mark.parametrize(("location", "layer"), PROBED)
def test_gradients_equal_finite_differences_of_forward_ablations(
    location: L, layer: int | None, loaded: LoadedModel
) -> None:
    prompt, step = random_ids(5, seed=2), 1e-5
    arguments: dict[str, Any] = {"objective": NextTokenLogProb(), "autoencoders": both_kinds()}
    [bare] = run_pass(loaded, [prompt], **arguments)
    for index in probed_indices(location, layer, bare):
        value = value_at(location, index, bare.values[location, FORWARD, layer])
        moved = []
        for shift in (step, -step):
            [found] = run_pass(
                loaded,
                [prompt],
                ablations=[ablate(location, index, layer, value + shift)],
                **arguments,
            )
            seen = value_at(location, index, found.values[location, FORWARD, layer])
            assert seen == pytest.approx(value + shift, rel=1e-14)
            assert found.objective_value is not None
            moved.append(found.objective_value)
        slope = (moved[0] - moved[1]) / (2 * step)
        gradient = value_at(location, index, bare.values[location, BACKWARD, layer])
        assert abs(gradient) > 1e-7
        assert slope == pytest.approx(gradient, rel=1e-5, abs=1e-9)


def test_ablating_to_what_is_there_changes_nothing(loaded: LoadedModel) -> None:
    prompt, objective = random_ids(6), LogitDiff(3)
    [bare] = run_pass(loaded, [prompt], objective=objective)
    ablations = []
    for (location, kind, layer), tensor in bare.values.items():
        if kind is FORWARD:
            index = (2, 1, 1) if location.is_pair_shaped else (2, *(0 for _ in location.axes))
            value = value_at(location, index, tensor)
            ablations.append(ablate(location, index, layer, value))
    [found] = run_pass(loaded, [prompt], objective=objective, ablations=ablations)
    forward = {place: tensor for place, tensor in found.values.items() if place[1] is FORWARD}
    assert_close(forward, {place: bare.values[place] for place in forward}, 1e-12)
    assert run_pass(loaded, [prompt], objective=objective, ablations=())[0].values.keys()


@pytest.mark.parametrize(
    "location",
    [one for one in LOCATIONS if one.has_layers or one is L.RESID_FINAL_LAYER_NORM_SCALE],
)
def test_a_gradient_ablation_acts_upstream_and_is_recorded_before_it(
    location: L, loaded: LoadedModel
) -> None:
    prompt, objective = random_ids(6), LogitDiff(3)
    layer = 1 if location.has_layers else None
    [bare] = run_pass(loaded, [prompt], objective=objective)
    [found] = run_pass(
        loaded,
        [prompt],
        objective=objective,
        ablations=[ablate(location, (), layer, 0.0, BACKWARD)],
    )
    here = (location, BACKWARD, layer)
    assert torch.equal(found.values[here], bare.values[here])
    assert found.objective_value == bare.objective_value
    start = (L.RESID_POST_EMBEDDING, BACKWARD, None)
    assert not torch.allclose(found.values[start], bare.values[start], rtol=1e-6)
    if location is L.RESID_POST_MLP:
        assert not found.values[start].any()
    assert found.values.keys() == bare.values.keys()


def test_an_ablated_head_never_sees_later_tokens(loaded: LoadedModel) -> None:
    prompt = random_ids(6)
    for location, value in ((L.ATTN_QK_PROBS, 0.25), (L.ATTN_QK_LOGITS, 1.0)):
        ablation = ablate(location, (None, None, 1), 0, value)
        [found] = run_pass(loaded, [prompt], ablations=[ablation])
        [changed] = run_pass(loaded, [[*prompt[:-1], prompt[-1] ^ 1]], ablations=[ablation])
        logits = (L.LOGITS, FORWARD, None)
        assert torch.equal(found.values[logits][:-1], changed.values[logits][:-1])
        head = found.values[location, FORWARD, 0][:, 1]
        assert torch.equal(head.tril(), torch.full_like(head, value).tril())
        above = torch.triu(torch.ones_like(head), 1).bool()
        assert (head[above] == (0 if location is L.ATTN_QK_PROBS else -torch.inf)).all()
