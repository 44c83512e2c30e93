"""Neuron pages in the layout that Neuronpedia exports and imports.

A directory ``<model>/<layer>-<set>`` per layer, with one row each in ``model.jsonl``,
``release.jsonl``, ``sourceset.jsonl`` and ``source.jsonl``, and batches of 1024 units in
``features/batch-<n>.jsonl.gz`` and ``activations/batch-<n>.jsonl.gz``. Columns are those of
its tables ``Neuron`` and ``Activation``; what a store does not know stays empty, as the
tables allow.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actstore.query.examples import Example, Kind
from actstore.query.exports.unit_record import Bars, UnitRecord

if TYPE_CHECKING:
    from actstore.query.session import Store

__all__ = ["BATCH_UNITS", "KINDS", "NeuronpediaSource", "activation_rows", "feature_row"]

KINDS: tuple[Kind, ...] = ("top", "quantile", "random", "bottom")
"""The examples that a unit's rows come from, the first of a context counts."""

BATCH_UNITS = 1024


@dataclass(frozen=True)
class NeuronpediaSource:
    """The identities under which a layer's units are known.

    Attributes:
        model: id of the model: letters, digits, ``-``, ``_`` and ``.``.
        layer: the layer.
        set_name: name of the source set, such as ``mlp_post_act``.
        creator: id of the user to whom the rows belong.
        release: name of the release.
        dataset: what the rows are of.
    """

    model: str
    layer: int
    set_name: str
    creator: str
    release: str
    dataset: str

    @classmethod
    def of_store(
        cls, store: "Store", scalar: str, layer: int, *, creator: str, release: str | None
    ) -> "NeuronpediaSource":
        """The identities of a store's layer."""
        model = re.sub(r"[^\w.-]+", "-", store.model_name).strip("-") or "model"
        set_name = re.sub(r"[^\w-]+", "-", scalar)
        return cls(
            model=model,
            layer=layer,
            set_name=set_name,
            creator=creator,
            release=release or f"{model}-{set_name}",
            dataset=f"actstore:{store.reader.manifest.id}",
        )

    @property
    def id(self) -> str:
        """Id of the source: what Neuronpedia calls the layer."""
        return f"{self.layer}-{self.set_name}"

    @property
    def folder(self) -> str:
        """Its directory below the export."""
        return f"{self.model}/{self.id}"

    def rows(self, store: "Store") -> Mapping[str, Mapping[str, Any]]:
        """File name -> its one row."""
        dimensions = store.sources.dimensions
        owned = {"creatorId": self.creator, "visibility": "PUBLIC"}
        return {
            "model.jsonl": {
                "id": self.model,
                "displayNameShort": self.model,
                "displayName": store.model_name,
                "instruct": False,
                "inferenceEnabled": False,
                "dimension": dimensions.d_model,
                "layers": dimensions.n_layers,
                "neuronsPerLayer": dimensions.d_mlp,
                "owner": "",
                **owned,
            },
            "release.jsonl": {
                "name": self.release,
                "description": f"{store.model_name}: {self.set_name}",
                "descriptionShort": self.set_name,
                "creatorName": self.creator,
                "creatorNameShort": self.creator,
                "urls": [],
                **owned,
            },
            "sourceset.jsonl": {
                "modelId": self.model,
                "name": self.set_name,
                "description": self.set_name,
                "type": "mlp",
                "creatorName": self.creator,
                "releaseName": self.release,
                "hasDashboards": True,
                "urls": [],
                **owned,
            },
            "source.jsonl": {
                "id": self.id,
                "modelId": self.model,
                "setName": self.set_name,
                "hasDashboards": True,
                "inferenceEnabled": False,
                "dataset": self.dataset,
                "num_prompts": len(store.row_map.committed_sequences),
                "num_tokens_in_prompt": int(store.reader.manifest.config["context"]),
                **owned,
            },
        }


def feature_row(source: NeuronpediaSource, record: UnitRecord) -> dict[str, Any]:
    """A unit as a row of the table ``Neuron``.

    ``frac_nonzero`` is the share above zero, which is what it is for the sparse features
    that the column was made for; ``pos_values`` and ``neg_values`` are direct effects on
    centred logits.
    """
    bars = Bars.of(record.histogram)
    return {
        "modelId": source.model,
        "layer": source.id,
        "index": str(record.unit),
        "creatorId": source.creator,
        "maxActApprox": record.greatest,
        "frac_nonzero": record.share_positive or 0.0,
        "freq_hist_data_bar_heights": list(bars.heights),
        "freq_hist_data_bar_values": list(bars.centres),
        "logits_hist_data_bar_heights": [],
        "logits_hist_data_bar_values": [],
        "neuron_alignment_indices": [],
        "neuron_alignment_l1": [],
        "neuron_alignment_values": [],
        "correlated_neurons_indices": [],
        "correlated_neurons_l1": [],
        "correlated_neurons_pearson": [],
        "decoder_weights_dist": [],
        "neg_str": [text for text, _ in record.suppressed],
        "neg_values": [score for _, score in record.suppressed],
        "pos_str": [text for text, _ in record.promoted],
        "pos_values": [score for _, score in record.promoted],
        "sourceSetName": source.set_name,
        "topkCosSimIndices": [unit for unit, _ in record.similar],
        "topkCosSimValues": [cosine for _, cosine in record.similar],
        "vector": [],
        "vectorLabel": None,
        "hookName": None,
        "vectorDefaultSteerStrength": None,
        "hasVector": False,
    }


def activation_rows(source: NeuronpediaSource, record: UnitRecord) -> Iterator[dict[str, Any]]:
    """A unit's contexts as rows of the table ``Activation``, each context once.

    Contexts from the middle of equal shares of the ranking say so by ``binMin`` and
    ``binMax``, the values between which the share lies as far as its neighbours tell, and
    ``binContains``, the share of rows it stands for.
    """
    seen: set[int] = set()
    shares = record.examples.get("quantile", ())
    for kind in KINDS:
        for place, row in enumerate(record.examples.get(kind, ())):
            if row.token in seen or not row.values:
                continue
            seen.add(row.token)
            bins = _bin(record, shares, place) if kind == "quantile" else (None, None, None)
            yield _activation(source, record.unit, row, bins)


def _activation(
    source: NeuronpediaSource,
    unit: int,
    row: Example,
    bins: tuple[float | None, float | None, float | None],
) -> dict[str, Any]:
    greatest = max(range(len(row.values)), key=row.values.__getitem__)
    name = f"{source.dataset} {source.model} {source.id} {unit} {row.first_token} {row.token}"
    return {
        # As long as the ids that are made there, and the same whenever this is exported.
        "id": "c" + hashlib.sha256(name.encode()).hexdigest()[:24],
        "modelId": source.model,
        "layer": source.id,
        "index": str(unit),
        "creatorId": source.creator,
        "dataSource": source.dataset,
        "dataIndex": str(row.sequence),
        "tokens": list(row.texts),
        "values": list(row.values),
        "maxValue": row.values[greatest],
        "maxValueTokenIndex": greatest,
        "minValue": min(row.values),
        "dfaValues": [],
        "dfaMaxValue": None,
        "dfaTargetIndex": None,
        "qualifyingTokenIndex": row.focus,
        "binMin": bins[0],
        "binMax": bins[1],
        "binContains": bins[2],
    }


def _bin(
    record: UnitRecord, shares: tuple[Example, ...], place: int
) -> tuple[float | None, float | None, float | None]:
    """The bounds of a share, halfway to the next examples, and its part of all rows."""
    value = shares[place].value
    low = record.least if place + 1 == len(shares) else (value + shares[place + 1].value) / 2
    high = record.greatest if place == 0 else (value + shares[place - 1].value) / 2
    return low, high, 1 / len(shares)
