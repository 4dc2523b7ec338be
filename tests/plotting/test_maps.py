from importlib.util import find_spec
from io import BytesIO
from itertools import pairwise

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.plotting import (
    embedding_colours,
    plot_column_map,
    plot_embedding_map,
    plot_footprints,
)
from dynamicvis_geo.plotting.maps import date_panels, panel_names


def vectors(count: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, 8)).astype(np.float32)


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for one in figure.legends for text in one.get_texts()]


def test_map_across_the_antimeridian_is_not_torn() -> None:
    west = [shapely.box(179 + x, -17, 179.25 + x, -16.75) for x in (0, 0.25, 0.5)]
    torn = shapely.MultiPolygon(
        [shapely.box(179.75, -17, 180, -16.75), shapely.box(-180, -17, -179.9, -16.75)]
    )
    east = [shapely.box(-179.9, -17, -179.6, -16.75)]
    figure = plot_embedding_map(vectors(5), [*west, torn, *east], 'pca')
    axes = figure.axes[0]
    left, right = axes.get_xlim()
    assert 178 < left < 179
    assert 180.3 < right < 181
    figure.savefig(BytesIO())
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert any(label.endswith('E') for label in labels)
    assert any(label.endswith('W') for label in labels)
    (polygons,) = axes.collections
    assert len(polygons.get_paths()) == 6


def test_two_utm_zones_lie_side_by_side_at_true_proportions() -> None:
    zones = [
        gpd.GeoSeries(shapely.box(x, 6.6e6, x + 50e3, 6.65e6), crs=crs).to_crs(4326)
        for x, crs in ((700e3, 'EPSG:32632'), (250e3, 'EPSG:32633'))
    ]
    footprints = np.concatenate([zone.to_numpy() for zone in zones])
    axes = plot_embedding_map(vectors(2), footprints, 'pca').axes[0]
    # At 60 degrees north, a degree of longitude is half as long as one of latitude.
    assert axes.get_aspect() == pytest.approx(2, rel=0.05)
    assert len(axes.collections[0].get_paths()) == 2


def test_footprints_too_small_to_see_become_points() -> None:
    footprints = [shapely.box(x, 45, x + 1e-3, 45.001) for x in np.linspace(0, 20, 30)]
    (points,) = plot_embedding_map(vectors(30), footprints, 'pca').axes[0].collections
    assert len(points.get_offsets()) == 30


def test_failures_are_crosses_and_places_unknown_are_left_out() -> None:
    boxes = [shapely.box(0, 0, 1, 1), shapely.Polygon()]
    colours = np.zeros((2, 3), np.float32)
    figure = plot_footprints(
        boxes,
        colours,
        failures=[None, shapely.Point(2, 2)],
        title='$no math',
        caption='$',
    )
    (shapes,) = figure.axes[0].collections
    (crosses,) = figure.axes[0].lines
    assert len(shapes.get_paths()) == 1
    assert crosses.get_xydata().tolist() == [[2, 2]]
    assert legend(figure) == ['failed (1)']
    figure.savefig(BytesIO())
    with pytest.raises(SpecError, match='none has a place'):
        plot_footprints([shapely.Polygon()], colours[:1])


@pytest.mark.parametrize('count', [1, 2])
def test_few_chips_make_a_map(count: int) -> None:
    boxes = [shapely.box(i, 89, i + 1, 90) for i in range(count)]
    plot_embedding_map(vectors(count), boxes).savefig(BytesIO())


def test_broken_embeddings_are_grey_and_none_at_all_are_refused() -> None:
    embeddings = vectors(4)
    embeddings[1, 2] = np.nan
    colours, words = embedding_colours(embeddings, 'pca')
    assert np.isnan(colours[1]).all()
    assert np.isfinite(colours[[0, 2, 3]]).all()
    assert 'of the variance' in words
    with pytest.raises(SpecError, match='none is finite'):
        embedding_colours(np.empty((0, 8), np.float32))
    with pytest.raises(SpecError, match='3 entries for 4'):
        plot_embedding_map(embeddings, [shapely.Point(0, 0)] * 3)


def test_umap_is_asked_for_by_name_and_said() -> None:
    with pytest.raises(SpecError, match="'tsne' is not one of"):
        embedding_colours(vectors(20), 'tsne')  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r'umap-learn|needs 16'):
        embedding_colours(vectors(5), 'umap')
    if find_spec('umap') is None:
        _, words = embedding_colours(vectors(30))
        assert 'PCA' in words


def two_dates(places: int = 3, years: int = 2) -> gpd.GeoDataFrame:
    boxes = [shapely.box(x / 100, 47, x / 100 + 0.01, 47.01) for x in range(places)]
    start = pd.to_datetime([f'{2020 + i}-06-01' for i in range(years)], utc=True)
    table = pd.DataFrame({'start': np.repeat(start, places)})
    table['end'] = table['start'] + pd.Timedelta(days=91)
    return gpd.GeoDataFrame(table, geometry=boxes * years, crs=4326)


def test_each_date_is_a_panel_with_the_same_colours() -> None:
    table = two_dates()
    assert date_panels(table[:3]) is None
    assert date_panels(table.drop(columns='start')) is None
    values = pd.Series(['water', 'trees', None, 'trees', 'trees', 'water'], name='c')
    figure = plot_column_map(
        values,
        table.geometry.to_numpy(),
        panels=date_panels(table),
        failures=table.geometry[4:5].to_numpy(),
        failure_panels=panel_names(table[4:5]),
    )
    first, second = figure.axes
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ['2020-06-01 to 2020-08-31', '2021-06-01 to 2021-08-31']
    assert (len(first.lines), len(second.lines)) == (0, 1)
    assert first.get_xlim() == second.get_xlim()
    drawn = [
        np.vstack([c.get_facecolor() for c in axes.collections]) for axes in figure.axes
    ]
    # What has no value is drawn first.
    grey, water, trees = drawn[0]
    assert (drawn[1] == [trees, trees, water]).all()
    words = ['trees (3)', 'water (2)', 'no value (1)', 'failed (1)']
    assert legend(figure) == words
    assert grey.tolist() != trees.tolist()
    with pytest.raises(SpecError, match='panels has 1 entries, not 6'):
        plot_column_map(values, table.geometry.to_numpy(), panels=['2020'])


def test_of_many_dates_six_are_shown_and_said() -> None:
    table = two_dates(1, 9)
    figure = plot_embedding_map(
        vectors(9), table.geometry.to_numpy(), 'pca', panels=date_panels(table)
    )
    titles = [axes.get_title()[:4] for axes in figure.axes]
    assert titles == ['2020', '2022', '2023', '2025', '2026', '2028']
    assert '6 of 9 dates are shown' in figure.get_supxlabel()


def test_holes_and_points_among_polygons_are_seen() -> None:
    ring = shapely.box(0, 0, 4, 4) - shapely.box(1, 1, 3, 3)
    shapes = [shapely.Point(2, 2), shapely.box(5, 0, 9, 4), ring]
    figure = plot_column_map(pd.Series(list('abc'), name='k'), shapes)
    axes = figure.axes[0]
    assert axes.collections[1].get_offsets().tolist() == [[2, 2]]
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = np.asarray(canvas.buffer_rgba())[::-1, :, :3]
    colours = {
        place: picture[
            tuple(axes.transData.transform(place)[::-1].astype(int))
        ].tolist()
        for place in ((0.5, 2), (1.5, 1.5), (2, 2), (7, 2))
    }
    assert colours[1.5, 1.5] == [255, 255, 255]
    assert len({tuple(colour) for colour in colours.values()}) == 4


def test_texts_of_narrow_panels_leave_each_other_free() -> None:
    table = two_dates(1, 3)
    tall = [shapely.box(12, 47, 12.01, 47.3)] * 3
    figure = plot_embedding_map(vectors(3), tall, 'pca', panels=date_panels(table))
    figure.draw_without_rendering()
    titles = [axes.title.get_window_extent() for axes in figure.axes]
    assert all(a.x1 < b.x0 for a, b in pairwise(titles))
    (words,) = (t for t in figure.axes[0].findobj(Text) if t.get_text() == '5 km')
    assert words.get_window_extent().y1 < titles[0].y0


def test_dates_on_a_colour_bar_are_whole_years() -> None:
    days = pd.Series(pd.date_range('2022-01-01', periods=40), name='day')
    boxes = [shapely.box(x, 0, x + 1, 1) for x in range(40)]
    bar = plot_column_map(days, boxes).axes[1]
    bar.figure.draw_without_rendering()
    assert all(t.get_text().startswith('202') for t in bar.get_yticklabels())
    assert bar.yaxis.get_offset_text().get_text() == ''


def test_numbers_have_a_colour_bar_and_maps_say_their_crs() -> None:
    boxes = [shapely.box(x, 47, x + 1, 47.5) for x in range(3)]
    values = pd.Series([0.5, 1.25, np.nan], name='height ($m$)')
    figure = plot_column_map(values, boxes, 'heights')
    axes, bar = figure.axes
    assert bar.get_ylabel() == 'height ($m$)'
    assert legend(figure) == ['no value (1)']
    words = figure.get_supxlabel()
    assert words.startswith('EPSG:4326, WGS 84; ')
    assert '3.00°E, 47.00°N to 47.50°N; degrees drawn at the scale of 47.2°N' in words
    texts = [text.get_text() for text in axes.findobj(Text)]
    assert {'50 km', 'N'} <= set(texts)
    figure.savefig(BytesIO())


def test_maps_that_no_bar_is_true_for_have_none_and_say_so() -> None:
    figure = plot_embedding_map(vectors(2), shapely.points([[0, 0], [0, 70]]), 'pca')
    assert 'no scale bar' in figure.get_supxlabel()
    texts = [text.get_text() for text in figure.axes[0].findobj(Text)]
    assert not any('km' in text for text in texts)
