"""Images with their classes: what the readers of all data sets return."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8

from .errors import DataError


class Split(NamedTuple):
    """Some images of a data set.

    Attributes:
      images: `[N, h, w, c]`, values 0 to 255.
      labels: their classes, `[N]`.
    """

    images: UInt8[np.ndarray, "size height width channels"]
    labels: Int32[np.ndarray, "size"]


def check_labels(labels: np.ndarray, num_classes: int, *, source: str) -> None:
    """Refuse labels outside `[0, num_classes)`, naming the first one.

    Args:
      labels: `[N]`, integers.
      num_classes: how many classes there are.
      source: where the labels are from, for the message.

    Raises:
      DataError: one is outside.

    Examples:
      >>> import numpy as np
      >>> from gompertz_jax.training.images import check_labels
      >>> check_labels(np.array([0, 12, 3]), 10, source="mine")
      Traceback (most recent call last):
      gompertz_jax.training.errors.DataError: mine: label 12 of example 1 is not one of 10 classes; ...
    """
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if wrong.size:
        raise DataError(
            f"{source}: label {labels[wrong[0]]} of example {wrong[0]} is not one of {num_classes} classes; "
            "the file is damaged or of another data set"
        )
