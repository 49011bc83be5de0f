"""Labels outside the classes are refused, naming the first."""

import numpy as np
import pytest

from gompertz_jax.training.errors import DataError
from gompertz_jax.training.images import check_labels


@pytest.mark.parametrize("label", [-1, 10])
def test_labels_outside_the_classes_are_refused(label):
    with pytest.raises(DataError, match=f"here: label {label} of example 2 is not one of 10 classes"):
        check_labels(np.array([0, 9, label, 99]), 10, source="here")
    check_labels(np.array([0, 9]), 10, source="here")
