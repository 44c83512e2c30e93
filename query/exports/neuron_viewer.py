"""Neuron pages as the activation records that the OpenAI neuron viewer reads.

One file per unit, ``<layer>/<unit>.json``: a ``NeuronRecord`` of the neuron-explainer
package with ``ActivationRecord`` members, every object tagged by ``dataclass_name`` as its
reader expects. NaN is null there, as in any JSON.
"""

from typing import Any

from actstore.query.examples import Example, Kind
from actstore.query.exports.unit_record import UnitRecord

__all__ = ["KINDS", "neuron_record", "record_path"]

KINDS: tuple[Kind, ...] = ("top", "random")
"""The examples that a record holds."""


def record_path(layer: int, unit: int) -> str:
    """Where a unit's record stands below the directory, as the package looks it up."""
    return f"{layer}/{unit}.json"


def neuron_record(record: UnitRecord) -> dict[str, Any]:
    """A unit as a ``NeuronRecord``; values may still be NaN."""
    return {
        "dataclass_name": "NeuronRecord",
        "neuron_id": {
            "dataclass_name": "NeuronId",
            "layer_index": record.layer,
            "neuron_index": record.unit,
        },
        "random_sample": [_activations(row) for row in record.examples.get("random", ())],
        # Random samples within quantiles are another thing than the middle of each.
        "random_sample_by_quantile": None,
        "quantile_boundaries": None,
        "mean": record.moments.mean,
        "variance": record.moments.variance,
        "skewness": record.moments.skewness,
        "kurtosis": record.moments.kurtosis,
        "most_positive_activation_records": [
            _activations(row) for row in record.examples.get("top", ())
        ],
    }


def _activations(row: Example) -> dict[str, Any]:
    return {
        "dataclass_name": "ActivationRecord",
        "tokens": list(row.texts),
        "activations": list(row.values),
    }
