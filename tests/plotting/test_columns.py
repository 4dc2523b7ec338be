from datetime import date

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.plotting.columns import column_colours
from dynamicvis_geo.plotting.palette import MISSING


def series(*values: object, name: str = 'a') -> pd.Series:
    return pd.Series(values, name=name)


@pytest.mark.parametrize(
    ('values', 'words'),
    [
        (series('water', None, 'bare'), ['bare (1)', 'water (1)', 'no value (1)']),
        (series('', 'wet'), ['empty (1)', 'wet (1)']),
        (series('test', 'val', 'train'), ['train (1)', 'val (1)', 'test (1)']),
        (series(False, True, True), ['True (2)', 'False (1)']),
        (series(True, False, None).astype('boolean'), ['True (1)', 'False (1)', '']),
        (series(10, 9, 2), ['2 (1)', '9 (1)', '10 (1)']),
        (series(10.0, np.nan, -2), ['-2 (1)', '10 (1)', 'no value (1)']),
        (series('b', 'a').astype('category'), ['a (1)', 'b (1)']),
        (series('zone 10', 'zone 2', '--5'), ['--5 (1)', 'zone 2 (1)', 'zone 10 (1)']),
        (series(2e20, 1e20), [f'1{"0" * 20} (1)', f'2{"0" * 20} (1)']),
        (series(date(2024, 5, 1), None), ['2024-05-01 (1)', 'no value (1)']),
        (
            pd.Series(pd.to_datetime(['2024-05-01', '2023-05-01'], utc=True), name='a'),
            ['2023-05-01 (1)', '2024-05-01 (1)'],
        ),
    ],
)
def test_few_values_are_classes_in_their_order(
    values: pd.Series, words: list[str]
) -> None:
    colours, key = column_colours(values)
    assert key.scale is None
    assert key.title == 'a'
    assert list(key.classes) == [word or 'no value (1)' for word in words]
    known = {tuple(np.float32(to_rgb(colour))) for colour in key.classes.values()}
    assert {tuple(colour) for colour in colours} == known
    grey = np.isclose(colours, to_rgb(MISSING)).all(axis=1)
    assert grey.tolist() == values.isna().tolist()


def test_numbers_have_a_scale_that_outliers_do_not_stretch() -> None:
    values = pd.Series([*np.linspace(1, 2, 998), 1e6, np.nan], name='height')
    colours, key = column_colours(values)
    assert key.scale is not None
    assert key.scale.norm.vmax == pytest.approx(2, abs=0.02)
    assert (key.scale.get_cmap().name, key.beyond) == ('cividis', 'both')
    assert list(key.classes) == ['no value (1)']
    assert len(np.unique(colours, axis=0)) > 200


@pytest.mark.parametrize(
    ('low', 'high', 'limits'),
    [(-2, 1, (-2, 2)), (-0.01, 1, (-0.01, 1)), (3, 4, (3, 4))],
)
def test_only_signed_numbers_have_0_in_the_middle(
    low: float, high: float, limits: tuple[float, float]
) -> None:
    _, key = column_colours(pd.Series(np.linspace(low, high, 50), name='error'))
    assert key.scale is not None
    assert (key.scale.norm.vmin, key.scale.norm.vmax) == limits
    assert (key.scale.get_cmap().name == 'PuOr') == (limits == (-2, 2))
    assert key.beyond == 'neither'


def test_a_single_number_has_the_colour_that_its_bar_shows() -> None:
    colours, key = column_colours(series(0.2, 0.2, None))
    assert key.scale is not None
    bar = Figure().colorbar(key.scale, cax=Figure().subplots())
    low, high = bar.ax.get_ylim()
    assert low < 0.2 < high
    shown = key.scale.get_cmap()((0.2 - low) / (high - low))[:3]
    assert colours[0].tolist() == pytest.approx(shown, abs=0.01)


def test_many_dates_are_years() -> None:
    dates = pd.Series(pd.date_range('2020-01-01', periods=40, freq='MS'), name='start')
    _, key = column_colours(dates)
    assert key.scale is not None
    assert (key.title, key.scale.norm.vmin) == ('start (year)', 2020)


def test_chosen_colours_are_of_classes() -> None:
    colours, _ = column_colours(series('oak', 'elm'), {'oak': '#000000'})
    assert (colours[0] == 0).all()
    with pytest.raises(SpecError, match='holds numbers'):
        column_colours(series(0.5, 1.5), {'oak': 'black'})


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        (series(None, None), 'all 2 are missing'),
        (series(np.nan, np.inf), 'all 2 are missing'),
        (pd.Series([f'chip-{i}' for i in range(31)], name='id'), "such as 'chip-0'"),
        (series(['a', 'b'], ['c']), r"such as \"\['a', 'b'\]\""),
    ],
)
def test_columns_without_colours_are_refused(values: pd.Series, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        column_colours(values)
