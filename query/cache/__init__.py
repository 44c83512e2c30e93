"""The activation cache: TransformerLens' questions, asked of stored sequences and prompts."""

from actstore.query.cache.attribution import LogitAttribution
from actstore.query.cache.batch import PassBatch, StoredBatch
from actstore.query.cache.cache import ActivationCache
from actstore.query.cache.logits import LogitLens
from actstore.query.cache.names import UnknownHook
from actstore.query.cache.view import View

__all__ = [
    "ActivationCache",
    "LogitAttribution",
    "LogitLens",
    "PassBatch",
    "StoredBatch",
    "UnknownHook",
    "View",
]
