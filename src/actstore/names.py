"""What `actstore` offers by name, and where it is found when it is asked for."""

from types import MappingProxyType

__all__ = ["LAZY"]

LAZY = MappingProxyType(
    {
        "Ablation": "actstore.store.nodes",
        "ActivationIndex": "actstore.store.nodes",
        "AttentionTraceType": "actstore.store.nodes",
        "AttnSubNodeIndex": "actstore.store.nodes",
        "Autoencoder": "actstore.store.model.autoencoders",
        "Autoencoders": "actstore.store.model.autoencoder_families",
        "DerivedScalar": "actstore.query.derived.declaration",
        "DstConfig": "actstore.query.derived.config",
        "Estimate": "actstore.ingest.estimate",
        "NodeIndex": "actstore.store.nodes",
        "NodeType": "actstore.store.vocabulary",
        "PreOrPostAct": "actstore.store.nodes",
        "Prompt": "actstore.prompt",
        "RawActivationStore": "actstore.prompt",
        "RemoteStore": "actstore.query.client",
        "Store": "actstore.query.session",
        "TraceConfig": "actstore.store.nodes",
        "connect": "actstore.query.client",
        "derived_scalar": "actstore.query.derived.naming",
        "export_neurons": "actstore.query.exports.neurons",
        "export_table": "actstore.query.exports.tables",
        "load_autoencoder": "actstore.store.model.autoencoder_formats",
        "load_scalars": "actstore.query.derived.loading",
        "register_scalar": "actstore.query.derived.registry",
        "temporary_scalars": "actstore.query.derived.registry",
        "unregister_scalar": "actstore.query.derived.registry",
        "view": "actstore.query.notebooks",
    }
)
"""Public names -> their modules, imported when asked for: too heavy for every import."""
