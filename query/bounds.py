"""Upper bounds of a derived scalar from the zone maps of a raw array.

The scalar is ``float32(float64(raw) * c[unit])`` with ``c = 1`` for raw ones. Both
roundings are monotone, so the image of a raw maximum (minimum for negative ``c``)
bounds the images of all values below it, with no slack.
"""

import numpy as np
import numpy.typing as npt

__all__ = ["derived_value", "score_bounds"]


def derived_value(
    raw: npt.NDArray[np.float32], coefficient: npt.NDArray[np.float64] | np.float64
) -> npt.NDArray[np.float32]:
    """The canonical value: the float64 product rounded once to float32."""
    with np.errstate(invalid="ignore", over="ignore"):
        product: npt.NDArray[np.float32] = (raw.astype(np.float64) * coefficient).astype(np.float32)
    return product


def score_bounds(
    maximum: npt.NDArray[np.float32],
    minimum: npt.NDArray[np.float32],
    coefficient: npt.NDArray[np.float64],
    largest: bool,
) -> npt.NDArray[np.float32]:
    """Bounds on the score (value, or minus value for the least) of zones.

    Args:
        maximum: raw maxima ``(unit, zone)``.
        minimum: raw minima ``(unit, zone)``.
        coefficient: ``(unit,)`` float64.
        largest: which end is asked for.

    Returns:
        float32 ``(unit, zone)``; plus infinity where no bound is known.
    """
    c = coefficient[:, None]
    upward = (c >= 0) == largest
    extreme = np.where(upward, maximum, minimum)
    value = derived_value(extreme, c)
    score = value if largest else -value
    # 0 * infinity is NaN and never ranks; what else the zone holds is 0.
    score = np.where(c == 0, np.float32(0), score)
    return np.where(np.isnan(score), np.float32(np.inf), score).astype(np.float32)
