"""A neuron, a head, a latent: what the store says of it equals what its parts say."""

import json
import math
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
from store_builder import build_store
from tiny_ingest import fresh_copy

from actstore.query.neuron import Neuron, similar_neurons
from actstore.query.neuron import neuron as neuron_of
from actstore.query.session import Store
from actstore.query.statistics import unit_histogram
from actstore.query.units import head, latent
from actstore.store.errors import ErrorKind, InvalidInput, StoreDamaged, Unavailable
from actstore.store.histograms import Histogram
from actstore.store.model.readout import READOUT_KEY, read_readout
from actstore.store.vocabulary import WeightLocationType

LENGTHS = [60, 41, 17, 58, 64] * 3
UNITS = 24
DEAD = 5


def values() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    tokens = sum(LENGTHS)
    activations = rng.normal(size=(2, tokens, UNITS)).astype(np.float32)
    activations[:, :, DEAD] = -np.abs(activations[:, :, DEAD])
    resid = rng.normal(size=(2, tokens, 8)).astype(np.float32)
    return {"mlp_post_act": activations, "resid_post_mlp": resid}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("neuron") / "store"
    return build_store(folder, values(), LENGTHS, special_token_ids=(3,))


@pytest.fixture(scope="module")
def store(path: Path) -> Store:
    return Store(path)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store without activations of neurons."""
    folder = tmp_path_factory.mktemp("bare") / "store"
    return Store(build_store(folder, {"resid_post_mlp": values()["resid_post_mlp"]}, LENGTHS))


# Neurons


@pytest.mark.parametrize("number", [0, DEAD, UNITS - 1])
def test_a_neuron_says_what_the_table_of_neurons_says(store: Store, number: int) -> None:
    found = neuron_of(store, 1, number)
    (row,) = (
        store.sql(f"SELECT * FROM neurons WHERE layer = 1 AND neuron = {number}")
        .to_arrow_table()
        .to_pylist()
    )
    for name in ("write_norm", "read_norm", "bias", "firing_rate", "dead"):
        assert getattr(found, name) == row[name]
    assert found.statistics is not None
    for name in ("count", "mean", "variance", "skewness", "kurtosis", "min", "max"):
        assert getattr(found.statistics, name) == row[name]
    for name in ("promoted", "suppressed"):
        assert [one.text for one in getattr(found, name)] == row[name]


def test_logits_are_those_of_the_readout_in_order(store: Store) -> None:
    readout = read_readout(store.path)
    found = neuron_of(store, 0, 7)
    assert [one.logit for one in found.promoted] == readout["promoted_score"][0, 7].tolist()
    assert [one.token_id for one in found.suppressed] == readout["suppressed_token"][0, 7].tolist()
    logits = [one.logit for one in found.promoted]
    assert logits == sorted(logits, reverse=True)


def test_the_rank_counts_greater_write_norms(store: Store) -> None:
    norms = read_readout(store.path)["write_norm"][0]
    order = np.argsort(-norms)
    for rank, number in enumerate(order.tolist(), 1):
        assert neuron_of(store, 0, number).write_rank == rank


def test_a_dead_neuron_is_said_to_be_dead(store: Store) -> None:
    found = neuron_of(store, 0, DEAD)
    assert found.dead is True
    assert found.firing_rate == 0
    assert "dead: above zero at none of" in repr(found)
    assert found.histogram is not None
    assert found.histogram.share_above(0).high == 0
    assert found.top is not None
    assert len(found.top) > 0
    assert neuron_of(store, 0, 0).dead is False


def test_the_histogram_is_that_of_the_activations(store: Store) -> None:
    found = neuron_of(store, 1, 3).histogram
    assert found is not None
    derived = store.derive("mlp_post_act", layers=[1])
    special = store.row_map.special(derived.rows)
    truth = Histogram.of_values(derived.numpy()[0][~special, 3])
    np.testing.assert_array_equal(found.counts, truth.counts)
    assert found.total == np.count_nonzero(~special)


def test_examples_are_those_of_the_unit(store: Store) -> None:
    found = neuron_of(store, 1, 3)
    assert found.top is not None
    assert found.bottom is not None
    direct = store.examples("mlp_post_act", (1, 3), k=20)
    assert found.top.rows == direct.rows
    assert found.top is found.top
    assert found.bottom[0].value < 0
    assert len(found.examples(k=2, kind="random")) == 2


@pytest.mark.parametrize("all_layers", [True, False])
def test_similar_neurons_have_the_greatest_cosines(store: Store, all_layers: bool) -> None:
    layers = (0, 1) if all_layers else (1,)
    rows = {
        layer: store.sources.model.weight(WeightLocationType.MLP_TO_RESIDUAL, layer)
        for layer in layers
    }
    own = rows[1][4]
    truth = sorted(
        (
            (-float(row @ own / np.linalg.norm(row) / np.linalg.norm(own)), layer, number)
            for layer, table in rows.items()
            for number, row in enumerate(table)
            if (layer, number) != (1, 4)
        )
    )[:10]
    found = similar_neurons(store, 1, 4, all_layers=all_layers)
    assert [(one.layer, one.neuron) for one in found] == [place[1:] for place in truth]
    for one, (cosine, *_) in zip(found, truth, strict=True):
        assert one.cosine == pytest.approx(-cosine, abs=1e-12)
    whole = neuron_of(store, 1, 4)
    assert (whole.similar if all_layers else whole.similar_in_layer) == found


def test_json_has_everything(store: Store) -> None:
    found = neuron_of(store, 0, 2)
    kept = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert (kept["layer"], kept["neuron"]) == (0, 2)
    assert kept["histogram"]["total"] == kept["statistics"]["count"]
    assert len(kept["similar"]) == 10
    assert len(kept["top"]["rows"]) > 0
    assert kept["promoted"][0]["text"] == found.promoted[0].text


def test_a_neuron_is_a_value_and_readable(store: Store) -> None:
    found = neuron_of(store, 0, 2)
    assert found == neuron_of(store, 0, 2)
    assert found != neuron_of(store, 0, 3)
    assert len({found, neuron_of(store, 0, 2)}) == 1
    with pytest.raises(FrozenInstanceError):
        found.layer = 3  # type: ignore[misc]
    assert repr(found).startswith("<Neuron 0:2: write norm ")
    assert f"of {UNITS}; above zero at " in repr(found)
    assert "promotes" in repr(found)


def test_without_activations_the_weights_still_speak(bare: Store) -> None:
    found = neuron_of(bare, 1, 3)
    assert found.statistics is None
    assert found.firing_rate is None
    assert found.dead is None
    assert found.write_norm is not None
    assert len(found.similar) == 10
    assert "no statistics" in repr(found)
    kept = found.to_json()
    assert kept["statistics"] is kept["histogram"] is kept["top"] is None


def test_before_the_first_segment_the_weights_still_speak(tmp_path: Path) -> None:
    path = build_store(tmp_path / "store", values(), LENGTHS, commit=[])
    found = neuron_of(Store(path), 0, 0)
    assert found.statistics is None
    assert found.promoted
    assert found.histogram is None


@pytest.mark.parametrize(
    ("layer", "number", "kind"),
    [
        (2, 0, ErrorKind.UNKNOWN_LAYER),
        (-1, 0, ErrorKind.UNKNOWN_LAYER),
        (True, 0, ErrorKind.UNKNOWN_LAYER),
        (0, UNITS, ErrorKind.UNKNOWN_UNIT),
        (0, 1.0, ErrorKind.UNKNOWN_UNIT),
    ],
)
def test_an_unknown_neuron_is_refused(
    store: Store, layer: int, number: int, kind: ErrorKind
) -> None:
    for ask in (neuron_of, similar_neurons):
        with pytest.raises(InvalidInput, match="0 to") as caught:
            ask(store, layer, number)
        assert caught.value.kind is kind


def test_a_missing_readout_is_damage_and_no_absence(tmp_path: Path) -> None:
    path = build_store(tmp_path / "store", values(), LENGTHS)
    (path / READOUT_KEY).unlink()
    with pytest.raises(StoreDamaged):
        neuron_of(Store(path), 0, 0)


def test_a_model_with_norms_after_its_mlp_compares_what_is_written(store: Store) -> None:
    # A gain that turns one channel off: the cosine is of what is left.
    class Gained:
        def weight(self, location: WeightLocationType, layer: int, dtype: str) -> np.ndarray:
            if location is WeightLocationType.LAYER_NORM_GAIN_POST_MLP:
                return np.array([0, 1, 1, 1, 1, 1, 1, 1], dtype)
            return np.eye(UNITS, 8, dtype=dtype) + (np.arange(UNITS) >= 8)[:, None]

    class Dimensions:
        has_post_norms = True
        d_mlp = UNITS

    class Sources:
        model = Gained()
        dimensions = Dimensions()

    class Fake:
        sources = Sources()
        n_layers = 1

    # The first neuron writes nothing now: it has no answers and is none.
    assert similar_neurons(Fake(), 0, 0) == ()  # type: ignore[arg-type]
    found = similar_neurons(Fake(), 0, 1, k=UNITS)  # type: ignore[arg-type]
    assert 0 not in [one.neuron for one in found]
    assert len(found) == UNITS - 2
    assert not any(math.isnan(one.cosine) for one in found)


# Heads and latents


def test_a_head_says_what_the_table_of_heads_says(store: Store) -> None:
    rows = store.sql("SELECT * FROM heads ORDER BY layer, head").fetchall()
    ranks = []
    for layer, number, write_norm, value_output_norm in rows:
        found = head(store, layer, number)
        assert (found.write_norm, found.value_output_norm) == (write_norm, value_output_norm)
        json.dumps(found.to_json())
        ranks.append(found.write_rank)
    assert set(ranks) == set(range(1, found.heads + 1))
    with pytest.raises(InvalidInput, match="head is"):
        head(store, 0, found.heads)


def test_a_latent_says_what_the_table_of_latents_says(tmp_path: Path) -> None:
    import torch

    from actstore.store.model.autoencoder_functions import ReLU
    from actstore.store.model.autoencoders import Autoencoder
    from actstore.store.vocabulary import ActivationLocationType

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    auto = Autoencoder(
        name="one",
        location=ActivationLocationType.MLP_POST_ACT,
        layer=1,
        encoder=random(24, 12),
        decoder=random(12, 24),
        latent_bias=torch.where(torch.arange(12) == 3, -1e3, random(12)),
        input_bias=random(24),
        output_bias=random(24),
        activation=ReLU(),
    )
    store = Store(fresh_copy(tmp_path / "store")).add_saes([auto])
    rows = store.sql("SELECT * FROM latents ORDER BY latent").to_arrow_table().to_pylist()
    assert len(rows) == 12
    for row in rows:
        found = latent(store, None, 1, row["latent"])
        for name in ("firing_rate", "dead", "active", "decoder_norm", "write_norm", "set"):
            assert getattr(found, name) == row[name]
        for name in ("count", "mean", "variance", "skewness", "max", "min", "special_max"):
            assert getattr(found.statistics, name) == row[name]
        json.dumps(found.to_json(), allow_nan=False)
        counted = unit_histogram(store, "mlp_autoencoder_latent", (1, row["latent"]))
        assert counted.total == row["count"]
        assert counted.total - counted.counts[126] == row["active"]
    assert latent(store, None, 1, 3).dead is True
    with pytest.raises(InvalidInput, match="has latents of layers 1"):
        latent(store, None, 0, 0)
    with pytest.raises(InvalidInput, match="latent is 12"):
        latent(store, None, 1, 12)
    with pytest.raises(Unavailable):
        latent(store, "other", 1, 0)


def test_a_neuron_type_is_what_the_store_gives(store: Store) -> None:
    assert isinstance(store.neuron(0, 0), Neuron)
    assert store.head(0, 1) == head(store, 0, 1)
    assert len(store.statistics("mlp_post_act", layers=0)) == UNITS
    assert store.histogram("mlp_post_act", (0, 0)).total > 0
