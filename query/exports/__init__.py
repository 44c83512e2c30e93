"""Answers and neuron pages as files that other tools read."""

from actstore.query.exports.neurons import NeuronSchema, export_neurons
from actstore.query.exports.tables import TableFormat, export_table

__all__ = ["NeuronSchema", "TableFormat", "export_neurons", "export_table"]
