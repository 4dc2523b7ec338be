import os
from pathlib import Path

import numpy as np
import pytest
from rasterio.errors import RasterioError

from dynamicvis_geo.errors import SourceError
from dynamicvis_geo.rasters import gdal_env, gdal_name, open_raster
from tests.datasets.rasters import pattern, write_geotiff
from tests.stores import Upload


@pytest.mark.parametrize(
    ('url', 'name'),
    [
        ('s3://b/a/x.tif', '/vsis3/b/a/x.tif'),
        ('gs://b/a/x.tif', '/vsigs/b/a/x.tif'),
        ('az://c/x.tif', '/vsiaz/c/x.tif'),
        ('https://h/x.tif?key=a%2Fb', '/vsicurl/https://h/x.tif?key=a%2Fb'),
        ('/vsizip/a.zip/x.tif', '/vsizip/a.zip/x.tif'),
        ('a/x.tif', 'a/x.tif'),
    ],
)
def test_gdal_has_names_of_its_own(url: str, name: str) -> None:
    assert gdal_name(url) == name


def test_urls_that_gdal_does_not_read_are_refused() -> None:
    with pytest.raises(SourceError, match=r'^memory://x\.tif: GDAL.*copy it'):
        open_raster('memory://x.tif')


def test_rasters_are_read_where_they_lie(
    tmp_path: Path, upload: Upload, web: str
) -> None:
    pixels = pattern(40, 30)
    path = write_geotiff(tmp_path / 'x.tif', pixels)
    url = upload(path)
    for place in (url, str(url), gdal_name(url), f'{web}/x.tif', path):
        with open_raster(place) as file:
            np.testing.assert_array_equal(file.read(), pixels)
    with pytest.raises(RasterioError, match=r'y\.tif'):
        open_raster(url.with_name('y.tif'))


def test_one_setting_names_the_server_to_both_libraries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in os.environ if name.startswith('AWS_')]:
        monkeypatch.delenv(name)
    assert 'AWS_S3_ENDPOINT' not in gdal_env().options
    monkeypatch.setenv('AWS_ENDPOINT_URL', 'https://s3.example:9000/')
    monkeypatch.setenv('AWS_VIRTUAL_HOSTING', 'TRUE')
    options = gdal_env().options
    assert options['AWS_S3_ENDPOINT'] == 's3.example:9000'
    assert options['AWS_HTTPS'] == 'YES'
    assert 'AWS_VIRTUAL_HOSTING' not in options
