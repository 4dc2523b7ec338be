"""Pictures of class maps, as predict-map writes them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from rasterio.transform import from_bounds

from dynamicvis_geo.errors import SourceError, SpecError
from dynamicvis_geo.evaluation.class_pictures import plot_class_maps
from dynamicvis_geo.plotting.marks import RANDOM_WEIGHTS
from dynamicvis_geo.plotting.palette import MISSING, class_colours

CLASSES = ('water', 'forest', 'sand')


def write_map(
    path: Path,
    values: Any,
    west: float = 500000,
    classes: tuple[str, ...] = CLASSES,
    crs: str = 'EPSG:32618',
    **tags: str,
) -> None:
    """Write a map ``[bands, h, w]`` of cells of 10 m; 255 or NaN is nodata."""
    values = np.asarray(values)
    count, height, width = values.shape
    path.parent.mkdir(exist_ok=True)
    south, north = (0.0, 60.0) if crs == 'EPSG:4326' else (4.5e6, 4.5e6 + 10 * height)
    east = west + (1 if crs == 'EPSG:4326' else 10 * width)
    with rasterio.open(
        path,
        'w',
        driver='GTiff',
        count=count,
        height=height,
        width=width,
        dtype=values.dtype,
        nodata=np.nan if values.dtype.kind == 'f' else 255,
        crs=crs,
        transform=from_bounds(west, south, east, north, width, height),
    ) as file:
        file.write(values)
        names = {f'class_{i}': name for i, name in enumerate(classes)}
        file.update_tags(chip_id=path.stem, **names, **tags)


def classes(*rows: list[int]) -> np.ndarray:
    return np.array([rows], np.uint8)


def test_maps_are_put_together_with_a_legend_of_shares(tmp_path: Path) -> None:
    write_map(tmp_path / 'a.tif', classes([0, 0], [0, 1]))
    write_map(tmp_path / 'b.tif', classes([2, 255], [1, 1]), west=500020)
    figure, shares = plot_class_maps(tmp_path)
    (axes,) = figure.axes
    shown = np.asarray(axes.images[0].get_array())
    colours = class_colours(CLASSES)
    for cell, name in (((0, 0), 'water'), ((1, 3), 'forest'), ((0, 2), 'sand')):
        assert shown[cell] == pytest.approx(to_rgb(colours[name]))
    assert shown[0, 3] == pytest.approx(to_rgb(MISSING))
    assert shares.iloc[:, 0].tolist() == pytest.approx([3 / 7, 3 / 7, 1 / 7])
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ['water  43 %', 'forest  43 %', 'sand  14 %', 'no class']
    assert axes.get_xlabel().startswith('EPSG:32618')


def test_colours_are_those_of_the_files_unless_others_are_chosen(
    tmp_path: Path,
) -> None:
    write_map(tmp_path / 'a.tif', classes([0, 1, 2]))
    with rasterio.open(tmp_path / 'a.tif', 'r+') as file:
        file.write_colormap(
            1, {0: (9, 9, 9, 255), 1: (8, 8, 8, 255), 2: (7, 7, 7, 255)}
        )
    figure, _ = plot_class_maps(tmp_path)
    assert (np.asarray(figure.axes[0].images[0].get_array()) * 255 < 10).all()
    figure, _ = plot_class_maps(tmp_path, {'sand': '#ff0000'})
    assert figure.axes[0].images[0].get_array()[0, 2].tolist() == [1, 0, 0]
    with pytest.raises(SpecError, match='beach'):
        plot_class_maps(tmp_path, {'beach': 'red'})


def test_dates_have_panels_and_shares_of_their_own(tmp_path: Path) -> None:
    for name, values in (('2022', [0, 0]), ('2023', [0, 1])):
        day = f'{name}-06-01T00:00:00+00:00'
        write_map(tmp_path / f'{name}.tif', classes(values), start=day, end=day)
    figure, shares = plot_class_maps(tmp_path)
    assert [axes.get_title() for axes in figure.axes] == ['2022-06-01', '2023-06-01']
    assert shares.loc['forest'].tolist() == [0, 0.5]
    assert figure.legends[0].get_texts()[0].get_text() == 'water  100 / 50 %'


def test_areas_of_degrees_are_those_on_the_ground(tmp_path: Path) -> None:
    # Of a degree from the equator to 60 degrees north, the half below 25.7 degrees.
    values = np.repeat([1, 0], (343, 257))[None, :, None].astype(np.uint8)
    write_map(tmp_path / 'a.tif', values, west=9, crs='EPSG:4326')
    _, shares = plot_class_maps(tmp_path)
    assert shares.iloc[0, 0] == pytest.approx(0.5, abs=0.002)


def test_maps_far_apart_are_drawn_one_by_one(tmp_path: Path) -> None:
    for i in range(14):
        write_map(tmp_path / f'{i:02}.tif', classes([0, 1]), west=4e5 + 1e4 * i)
    figure, shares = plot_class_maps(tmp_path)
    assert len(figure.axes) == 12
    assert shares.shape == (3, 12)
    assert '2 of 14 panels are not shown' in figure.get_suptitle()


def test_labels_have_panels_and_numbers_a_colour_bar(tmp_path: Path) -> None:
    labels = np.array([[[1, 0]], [[1, 1]]], np.uint8)
    write_map(tmp_path / 'labels' / 'a.tif', labels, classes=('wet', 'green'))
    figure, shares = plot_class_maps(tmp_path / 'labels')
    assert [axes.get_title() for axes in figure.axes] == ['wet  50 %', 'green  100 %']
    assert shares.iloc[:, 0].tolist() == [0.5, 1.0]
    heights = np.array([[[1.5, 20, np.nan]]], np.float32)
    write_map(tmp_path / 'numbers' / 'a.tif', heights, classes=())
    figure, shares = plot_class_maps(tmp_path / 'numbers')
    assert len(shares) == 0
    assert [axes.get_ylabel() for axes in figure.axes] == ['', 'prediction']


def test_a_single_number_has_the_colour_that_its_bar_shows(tmp_path: Path) -> None:
    write_map(tmp_path / 'a.tif', np.full((1, 2, 2), 7, np.float32), classes=())
    axes, bar = plot_class_maps(tmp_path)[0].axes
    low, high = bar.get_ylim()
    shown = colormaps['cividis']((7 - low) / (high - low))[:3]
    assert axes.images[0].get_array()[0, 0].tolist() == pytest.approx(shown, abs=0.01)


def test_dollar_signs_of_names_are_shown(tmp_path: Path) -> None:
    write_map(tmp_path / 'a.tif', classes([0, 0]), classes=('$x_1$ for $5', 'b'))
    texts = plot_class_maps(tmp_path)[0].legends[0].get_texts()
    assert not any(text.get_parse_math() for text in texts)


def test_random_weights_are_said(tmp_path: Path) -> None:
    made = (
        '{"processing:software": {"dynamicvis-geo": "0"}, '
        '"features": {"model": {"backbone": {"weights": "random"}}}}'
    )
    write_map(tmp_path / 'a.tif', classes([0]), dynamicvis_geo=made)
    figure, _ = plot_class_maps(tmp_path / 'a.tif')
    assert RANDOM_WEIGHTS in figure.get_suptitle()


def test_what_is_no_map_of_a_probe_is_refused(tmp_path: Path) -> None:
    write_map(tmp_path / 'a.tif', np.zeros((6, 2, 2), np.float32), classes=())
    with pytest.raises(SourceError, match='6 bands and 0 names of classes'):
        plot_class_maps(tmp_path)
    write_map(tmp_path / 'a.tif', classes([0]))
    write_map(tmp_path / 'b.tif', classes([0]), classes=('water', 'else'))
    with pytest.raises(SourceError, match=r'b\.tif has other classes'):
        plot_class_maps(tmp_path)
    write_map(tmp_path / 'b.tif', classes([7]))
    with pytest.raises(SourceError, match=r'b\.tif.*7.*3 classes'):
        plot_class_maps(tmp_path)
    write_map(tmp_path / 'b.tif', classes([7]), classes=())
    (tmp_path / 'a.tif').unlink()
    with pytest.raises(SourceError, match=r'b\.tif.*uint8'):
        plot_class_maps(tmp_path)
