"""The tables of latents in a snapshot, filled from the sets of latents."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.store.keys import key_values
from actstore.store.latent_reader import LatentSet
from actstore.store.layout import StoredDtype

__all__ = ["latent_rows", "top_latent_rows"]


def latent_rows(found: LatentSet, layer: int) -> dict[str, Any]:
    """One row per latent of a layer: statistics over ordinary rows, and norms.

    Raises:
        StoreDamaged: a block of the files fails its checksum.
    """
    array = found.layers[layer]
    statistics, norms = array.statistics(), found.norms(layer)
    seen, active = statistics.moments.count, statistics.active
    with np.errstate(invalid="ignore"):
        rate = active / seen
    columns = {
        "layer": np.full(array.n_latents, layer),
        "latent": np.arange(array.n_latents),
        "set": pa.repeat(found.name, array.n_latents),
        "location": pa.repeat(found.location, array.n_latents),
        "firing_rate": _nullable(rate),
        "max": _nullable(statistics.maximum),
        "min": _nullable(statistics.minimum),
        "mean": _nullable(statistics.moments.mean),
        "variance": _nullable(statistics.moments.variance),
        "skewness": _nullable(statistics.moments.skewness),
        "kurtosis": _nullable(statistics.moments.kurtosis),
        "count": seen,
        "active": active,
        "special_max": _nullable(statistics.special_maximum),
        "decoder_norm": norms.decoder,
        "dead": pa.array(active == 0, mask=seen == 0),
    }
    return columns if norms.write is None else {**columns, "write_norm": norms.write}


def top_latent_rows(found: LatentSet, layer: int, most: int) -> dict[str, Any]:
    """The first proven entries of the values above zero, ordered by latent and rank.

    Raises:
        StoreDamaged: a block of the files fails its checksum.
    """
    lists = found.layers[layer].lists("top")
    rank = np.arange(min(most, lists.keys.shape[1]))
    latent, place = np.nonzero(rank < lists.proven[:, None])
    return {
        "set": pa.repeat(found.name, len(latent)),
        "location": pa.repeat(found.location, len(latent)),
        "layer": np.full(len(latent), layer),
        "latent": latent,
        "rank": place + 1,
        "token": lists.rows[latent, place],
        "value": key_values(lists.keys[latent, place], StoredDtype.FLOAT32),
    }


def _nullable(values: npt.NDArray[np.floating]) -> pa.Array:
    return pa.array(values, mask=np.isnan(values))
