"""Which learning rate is taken."""

import pytest
from comparison.rates import choose_rate


@pytest.mark.parametrize(
    ("gains", "chosen"),
    [
        # better by a little in both seeds, but the seeds differ by more
        ({1.0: {0: 1.0, 1: 2.0}, 2.0: {0: 1.5, 1: 2.5}}, 1.0),
        ({1.0: {0: 1.0, 1: 1.1}, 2.0: {0: 1.5, 1: 1.7}}, 2.0),
        ({1.0: {0: 1.0, 1: 1.1}, 2.0: {0: 0.0, 1: 3.0}}, 1.0),
        ({0.5: {0: 4.0, 1: 4.1}, 1.0: {0: 1.0, 1: 1.1}, 2.0: {0: 5.0, 1: 5.1}}, 2.0),
        ({0.5: {0: 4.0, 1: 4.1}, 1.0: {0: 1.0, 1: 1.1}, 2.0: {0: 5.0}}, 0.5),
        ({0.5: {0: -4.0, 1: -4.1}, 1.0: {0: 1.0, 1: 1.1}, 2.0: {}}, 1.0),
        # one seed says nothing
        ({1.0: {0: 1.0}, 2.0: {0: 5.0}}, 1.0),
        # the default failed
        ({0.5: {0: 4.0, 1: 4.1}, 1.0: {}, 2.0: {0: 5.0, 1: 2.0}}, 0.5),
        ({0.5: {}, 1.0: {}}, 1.0),
    ],
)
def test_a_rate_is_taken_for_more_than_noise(gains, chosen):
    assert choose_rate(1.0, gains) == chosen
