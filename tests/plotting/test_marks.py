from matplotlib.figure import Figure

from dynamicvis_geo.plotting.marks import RANDOM_WEIGHTS, mark_random_weights

RANDOM = {'model': {'backbone': {'weights': 'random'}}}


def test_random_weights_are_said_once_under_the_title() -> None:
    figure = Figure()
    figure.suptitle('Price: $5')
    mark_random_weights(figure, RANDOM)
    mark_random_weights(figure, RANDOM)
    assert figure.get_suptitle().splitlines() == ['Price: $5', RANDOM_WEIGHTS]
    bare = Figure()
    mark_random_weights(bare, RANDOM)
    assert bare.get_suptitle() == RANDOM_WEIGHTS


def test_others_are_left_as_they_are() -> None:
    figure = Figure()
    for provenance in ({}, {'model': {'backbone': {'weights': 'pretrained'}}}):
        mark_random_weights(figure, provenance)
    assert figure.get_suptitle() == ''
