from pathlib import Path

import pytest
from upath import UPath

from dynamicvis_geo.errors import OutputError, SourceError, SpecError
from dynamicvis_geo.paths import (
    image_path,
    input_path,
    kind_of,
    local_input,
    local_output,
    output_path,
)
from tests.stores import Upload


@pytest.mark.parametrize(
    'url', ['s3://bucket/a/x.tif', 'memory://a/x.tif', 'https://a.example/x.tif?q=1']
)
def test_urls_are_kept_as_they_are(url: str) -> None:
    for given in (url, UPath(url)):
        checked = input_path(given)
        assert isinstance(checked, UPath)
        assert str(checked) == url
    assert str(image_path(url)) == url


def test_local_paths_stay_local(tmp_path: Path) -> None:
    assert input_path(f'file://{tmp_path}/x') == tmp_path / 'x'
    assert input_path('~/x') == Path.home() / 'x'
    assert isinstance(output_path(tmp_path / 'x'), Path)
    assert image_path('/vsizip/a.zip/x.tif') == '/vsizip/a.zip/x.tif'


@pytest.mark.parametrize(
    ('url', 'words'),
    [
        ('gs://b/x', r"pip install 'dynamicvis-geo\[gcs\]'"),
        ('simplecache::gs://b/x', r"pip install 'dynamicvis-geo\[gcs\]'"),
        ('az://b/x', 'pip install adlfs'),
        ('nope://b/x', 'no URL of a known kind.*s3://'),
        (Path('s3://b/x'), 'lost a slash.*as text'),
        ('/vsis3/b/x', "path of GDAL's.*s3://BUCKET/KEY"),
    ],
)
def test_urls_that_cannot_be_read_are_refused(url: str | Path, words: str) -> None:
    for check, error in ((input_path, SpecError), (output_path, OutputError)):
        with pytest.raises(error, match=f"^there='{url}' .*{words}"):
            check(url, 'there')


def test_what_cannot_be_written_is_refused() -> None:
    with pytest.raises(OutputError, match='web address, which can only be read'):
        output_path('https://a.example/x.parquet')
    with pytest.raises(OutputError, match='root of a file system'):
        output_path('s3://bucket')
    with pytest.raises(OutputError, match=r"cache='s3://b/x' is a URL.*local disks"):
        local_output('s3://b/x', 'cache')
    with pytest.raises(SpecError, match=r"probe='s3://b/x' is a URL.*local disks"):
        local_input('s3://b/x', 'probe')


def test_files_and_folders_are_told_apart(tmp_path: Path, upload: Upload) -> None:
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'folder' / 'x').write_text('x')
    folder = upload(tmp_path / 'folder')
    for place in (tmp_path / 'folder', folder):
        kinds = [kind_of(p) for p in (place, place / 'x', place / 'y')]
        assert kinds == ['folder', 'file', None]
    # Written by somebody else, after the folder was looked at.
    upload(tmp_path / 'folder' / 'x', 'folder/y')
    assert kind_of(folder / 'y') == 'file'


def test_a_store_without_credentials_is_an_error_of_one_line(
    bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ('AWS_ACCESS_KEY_ID', 'AWS_SECRET_ACCESS_KEY'):
        monkeypatch.delenv(name)
    monkeypatch.setenv('AWS_EC2_METADATA_DISABLED', 'true')
    monkeypatch.setenv('AWS_SHARED_CREDENTIALS_FILE', str(tmp_path / 'none'))
    UPath(bucket).fs.clear_instance_cache()
    with pytest.raises(SourceError, match=rf'^{bucket}/x: cannot be reached \(.*cred'):
        kind_of(UPath(f'{bucket}/x'))
