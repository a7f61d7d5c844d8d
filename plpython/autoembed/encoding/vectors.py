"""What every vector must be before it is written, and pgvector's text form.

numpy and orjson are imported by the first vector: a call that finds nothing pending must not pay for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from autoembed.models.model import Model

NORM_TOLERANCE = 1e-3


def to_text(vector: NDArray[np.float32]) -> str:
    """Returns pgvector's text form; each number is the shortest that reads back as the same float32."""
    import numpy as np
    import orjson

    contiguous = np.ascontiguousarray(vector, dtype=np.float32)
    return orjson.dumps(contiguous, option=orjson.OPT_SERIALIZE_NUMPY).decode("ascii")


def problem(vector: NDArray[np.float32], model: Model) -> str | None:
    """Returns why this vector must not be written, or None."""
    import numpy as np

    if vector.shape != (model.dimensions,):
        return f"the vector's shape is {vector.shape}, expected were {model.dimensions} dimensions"
    if not np.isfinite(vector).all():
        return "the vector has numbers that are not finite"
    norm = float(np.linalg.norm(vector.astype(np.float64)))
    if norm == 0.0:
        return "the vector is zero"
    if model.normalizes and abs(norm - 1.0) > NORM_TOLERANCE:
        return f"the vector's norm is {norm:.4g}, and the model normalises to 1"
    return None
