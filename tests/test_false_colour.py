import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rasterio

from dynamicvis_geo.errors import OutputError, SpecError
from dynamicvis_geo.false_colour import (
    fit_file_colours,
    plot_false_colours,
    write_false_colours,
)
from dynamicvis_geo.formats.geotiff import feature_map_files, read_feature_map
from dynamicvis_geo.outputs import open_output
from dynamicvis_geo.plotting import fit_map_colours
from dynamicvis_geo.plotting.marks import RANDOM_WEIGHTS
from dynamicvis_geo.provenance import read_provenance
from tests.outputs import PROVENANCE, write_grid


def test_geotiffs_have_the_place_of_their_maps_and_colours_in_common(
    tmp_path: Path,
) -> None:
    features = write_grid(tmp_path / 'maps')
    files = feature_map_files(tmp_path / 'maps')
    # Equal vectors in two maps, and one that is not finite.
    for path, cell in ((files[0], (0, 0)), (files[3], (2, 1))):
        with rasterio.open(path, 'r+') as file:
            values = file.read()
            values[:, *cell] = features[1, :, 1, 1]
            values[:, 3, 3] = np.nan
            file.write(values)
    colours = write_false_colours(files, tmp_path / 'colours')
    written = []
    for path in files:
        with (
            rasterio.open(path) as source,
            rasterio.open(tmp_path / 'colours' / path.name) as target,
        ):
            assert target.crs == source.crs
            assert target.transform == source.transform
            assert target.shape == source.shape
            assert set(target.dtypes) == {'uint8'}
            assert target.nodata == 0
            assert target.tags()['chip_id'] == source.tags()['chip_id']
            shown = json.loads(target.tags()['false_colour'])
            written.append(target.read())
    assert shown['explained_variance'] == pytest.approx(colours.explained.tolist())
    provenance = read_provenance(tmp_path / 'colours' / files[0].name)
    assert provenance['run'] == PROVENANCE['run']
    assert (written[0][:, 3, 3] == 0).all()
    assert written[0][:, 0, 0].tolist() == written[3][:, 2, 1].tolist()
    assert written[0][:, 0, 0].tolist() == written[1][:, 1, 1].tolist()
    assert (written[1] >= 1).all()


def test_colours_are_those_of_all_maps_together(tmp_path: Path) -> None:
    write_grid(tmp_path / 'maps')
    files = feature_map_files(tmp_path / 'maps')
    one_by_one = fit_file_colours(files)
    together = fit_map_colours([read_feature_map(file) for file in files])
    for name in ('mean', 'components', 'low', 'high', 'explained'):
        np.testing.assert_array_equal(
            getattr(one_by_one, name), getattr(together, name)
        )


def test_the_folder_of_the_maps_is_not_overwritten(tmp_path: Path) -> None:
    write_grid(tmp_path / 'maps')
    files = feature_map_files(tmp_path / 'maps')
    with pytest.raises(OutputError, match='holds the feature maps'):
        write_false_colours(files, tmp_path / 'other' / '..' / 'maps')
    with rasterio.open(files[0]) as file:
        assert file.count == 6


def test_maps_of_two_models_share_no_colours(tmp_path: Path) -> None:
    write_grid(tmp_path / 'one')
    write_grid(tmp_path / 'other', dimensions=7)
    files = [
        path for name in ('one', 'other') for path in feature_map_files(tmp_path / name)
    ]
    with pytest.raises(SpecError, match='6 and 7 channels'):
        fit_file_colours(files)


def test_neighbouring_maps_make_a_mosaic_and_far_ones_a_sheet(tmp_path: Path) -> None:
    write_grid(tmp_path / 'maps', count=3)
    run = open_output(tmp_path / 'maps')
    (axes,) = plot_false_colours(run).axes
    assert axes.images[0].get_array().shape == (4, 12, 3)
    assert 'EPSG:32618' in axes.get_xlabel()
    run.chips.loc[2, ['minx', 'maxx']] += 1e5
    assert len(plot_false_colours(run).axes) == 3


def test_random_weights_are_said_in_pictures_and_geotiffs(tmp_path: Path) -> None:
    random = {'model': {'backbone': {'weights': 'random'}}}
    write_grid(tmp_path / 'maps', count=2, provenance=random)
    files = feature_map_files(tmp_path / 'maps')
    write_false_colours(files, tmp_path / 'colours')
    with rasterio.open(tmp_path / 'colours' / files[0].name) as file:
        assert file.tags()['warning'] == RANDOM_WEIGHTS
    title = plot_false_colours(open_output(tmp_path / 'maps')).get_suptitle()
    assert title.endswith(RANDOM_WEIGHTS)
    assert '% of the variance' in title


def test_dates_of_one_place_stand_side_by_side(tmp_path: Path) -> None:
    write_grid(tmp_path / 'maps', count=2)
    run = open_output(tmp_path / 'maps')
    run.chips.loc[1, ['minx', 'maxx']] = run.chips.loc[0, ['minx', 'maxx']]
    run.chips.loc[0, ['start', 'end']] += pd.Timedelta(days=365)
    panels = plot_false_colours(run).axes
    assert ['2024' in axes.get_title() for axes in panels] == [True, False]
