"""What the quick start says of its table."""

import numpy as np

from examples.quickstart import Record, conclusion


def record(losses, accuracies):
    return Record(np.array(losses)[:, None], np.array(accuracies)[:, None], 1.0, 1)


def test_the_conclusion_is_that_of_the_table():
    records = {
        ("Middle", 1e-1): record([0.3, 0.5], [0.90, 0.92]),
        ("Low", 1e-2): record([0.1, 0.1], [0.88, 0.90]),
        ("High", 1e-3): record([0.9, 0.7], [0.90, 0.90]),
    }
    assert conclusion(records, test_size=900) == (
        "Low ends with the lowest training loss, 0.25 times that of Middle;"
        " test accuracies differ by up to 0.020, and one standard error is 0.010."
    )
