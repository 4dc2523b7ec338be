import base64
import re
import shutil
import subprocess
from hashlib import sha256
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import geopandas as gpd
import numpy as np
import pytest
import rasterio
import shapely
from matplotlib.colors import to_rgb

from dynamicvis_geo.errors import SourceError
from dynamicvis_geo.report import write_report
from tests.outputs import PROVENANCE, write_grid, write_pooled
from tests.processes import HANG
from tests.test_quicklooks import write

SVG = '{http://www.w3.org/2000/svg}'
HOSTILE = (
    '</td><script src="http://evil.example/x.js">alert(1)</script>&amp;\x00\u202e"\''
)


def parse(path: Path) -> ElementTree.Element:
    """Parse a page strictly: it is written so that it is XML, too."""
    text = path.read_text('utf-8')
    doctype = '<!DOCTYPE html>\n'
    assert text.startswith(doctype)
    return ElementTree.fromstring(text.removeprefix(doctype))


def svg(path: Path) -> ElementTree.Element:
    (drawing,) = parse(path).iter(f'{SVG}svg')
    return drawing


def words(page: ElementTree.Element) -> str:
    return ' '.join(' '.join(page.itertext()).split())


def check_alone(path: Path) -> None:
    """Check that the page loads nothing, and that a reader can do without eyes."""
    page = parse(path)
    for element in page.iter():
        assert element.tag not in ('link', 'iframe', 'object', 'base')
        for name in ('src', 'href', 'srcset', 'data', 'poster'):
            assert element.get(name, 'data:').startswith('data:image/png;base64,') or (
                element.get(name) is None
            )
        assert not any(name.startswith('on') for name in element.attrib)
        if element.tag == 'img':
            assert element.get('alt')
        if element.tag == 'table':
            assert element.get('aria-label') or element.find('caption') is not None
            assert all(th.get('scope') for th in element.iter('th'))
        if element.tag == 'svg':
            assert element.get('aria-label')
        if element.tag == 'button':
            assert element.get('aria-label')
    # Its own script, and by the hash of it no other, is allowed to run.
    policy = page.find('head/meta[@http-equiv="Content-Security-Policy"]')
    assert policy is not None
    scripts = [script.text or '' for script in page.iter('script')]
    assert len(scripts) <= 1
    for script in scripts:
        assert 'figure.map' in script
        digest = base64.b64encode(sha256(script.encode()).digest()).decode()
        assert f"script-src 'sha256-{digest}'" in policy.get('content', '')
    style = page.find('head/style')
    assert style is not None
    assert not re.search(r'url\(|@import', style.text or '')
    ids = [element.get('id') for element in page.iter() if element.get('id')]
    assert len(ids) == len(set(ids))
    HTMLParser().feed(path.read_text('utf-8'))


def test_page_of_embeddings_says_what_how_and_where(tmp_path: Path) -> None:
    write_pooled(tmp_path / 'e.parquet')
    page = write_report(tmp_path / 'e.parquet', tmp_path / 'sub' / 'e.html')
    check_alone(page)
    text = words(parse(page))
    assert 'Chips 12' in text
    assert 'Length of a vector 6' in text
    assert '2024-06-01 to 2024-09-01' in text
    assert 'EPSG:32618 (12)' in text
    assert 'mean 0.625, lowest 0.250; 1 chips are fully valid' in text
    assert '4 chips are less than half valid' in text
    assert 'Checkpoint weights.pth' in text
    assert f'SHA-256 {"c0ffee" * 10}' in text
    assert 'Sensor collection: COPERNICUS/S2; cloudy_pct: 30' in text
    assert 'Time windows 2024-06-01, 2024-09-01' in text
    assert 'Command dynamicvis-geo embed scene.tif' in text
    assert 'preprocessing: input_range 0, 3000' in text
    assert 'weights are random' not in text
    # Two histograms; without images there is nothing else to show.
    alts = [img.get('alt') or '' for img in parse(page).iter('img')]
    assert alts[0].startswith('Histogram of valid fraction of 12 chips')
    assert alts[1].startswith('Histogram of cosine similarity of 20,000 pairs of chips')
    assert len(alts) == 2
    titles = [title.text or '' for title in svg(page).iter(f'{SVG}title')]
    assert len(titles) == 12
    assert titles[0].startswith('chip-0, 2024-06-01, valid 0.25, 40.6')
    # What is essential is not folded, all else is.
    (folded,) = parse(page).iter('details')
    assert folded.get('open') is None
    assert 'Checkpoint weights.pth' not in words(folded)
    assert 'preprocessing: input_range 0, 3000' in words(folded)


def test_random_weights_and_failures_are_said_loudly(tmp_path: Path) -> None:
    provenance = {**PROVENANCE, 'model': {'backbone': {'weights': 'random'}}}
    write_pooled(tmp_path / 'e.parquet', provenance=provenance)
    failures = gpd.GeoDataFrame(
        {
            'id': ['x1', HOSTILE, None],
            'reason': ['no imagery', 'no imagery', None],
            'message': ['no scene', HOSTILE, None],
        },
        geometry=[
            shapely.box(-75, 40.6, -74.99, 40.61),
            None,
            shapely.Point(-75, 40.6),
        ],
        crs='EPSG:4326',
    )
    failures.to_parquet(tmp_path / 'e.failures.parquet')
    page = write_report(tmp_path / 'e.parquet', tmp_path / 'e.html')
    check_alone(page)
    (alarm,) = [e for e in parse(page).iter('p') if e.get('role') == 'alert']
    assert 'weights are random' in words(alarm)
    text = words(parse(page))
    assert 'Failures 3' in text
    assert 'no imagery 2' in text
    assert 'not told 1' in text
    assert 'x1 no scene' in text
    assert 'and of 3 failures' in svg(page).get('aria-label', '')
    crosses = svg(page).findall(f"{SVG}g[@class='crosses']/{SVG}g/{SVG}title")
    assert [cross.text for cross in crosses] == [
        'No embedding: x1, no imagery',
        'No embedding: not told, not told',
    ]


def test_what_files_say_is_shown_and_never_obeyed(tmp_path: Path) -> None:
    provenance = {
        HOSTILE: HOSTILE,
        'model': {'backbone': {'weights': HOSTILE}},
        'run': HOSTILE,
        'source': {'sources': HOSTILE},
    }
    ids = [f'{HOSTILE}{i}' for i in range(12)]
    write_pooled(tmp_path / 'e.parquet', provenance=provenance, chip_id=ids)
    write(tmp_path / 'scene.tif', np.ones((3, 8, 8), np.uint16))
    page = write_report(tmp_path / 'e.parquet', tmp_path / 'e.html')
    check_alone(page)
    source = page.read_text('utf-8')
    assert source.count('<script') == 1
    assert 'alert(1)</script' not in source
    assert '\x00' not in source
    assert '\u202e' not in source
    shown = escape(HOSTILE.split('\x00')[0], quote=False)
    assert shown.replace('"', '&#34;') in source


def test_page_of_maps_shows_images_beside_features(tmp_path: Path) -> None:
    features = write_grid(tmp_path / 'maps')
    with rasterio.open(next((tmp_path / 'maps').glob('*.tif'))) as file:
        transform = file.transform
    write(
        tmp_path / 'scene.tif',
        np.random.default_rng(0).integers(0, 9999, (3, 32, 64)).astype(np.uint16),
        crs='EPSG:32618',
        transform=rasterio.Affine(10, 0, transform.c, 0, -10, transform.f),
    )
    page = write_report(
        tmp_path / 'maps', tmp_path / 'maps.html', tmp_path / 'scene.tif'
    )
    check_alone(page)
    text = words(parse(page))
    assert f'Chips {len(features)}' in text
    assert 'Size of a chip 4 x 4 cells' in text
    assert 'chip-3' in text
    alts = [img.get('alt') or '' for img in parse(page).iter('img')]
    assert sum(alt.startswith('Image of chip') for alt in alts) == 2
    assert sum(alt.startswith('Features of chip') for alt in alts) == 4


def test_an_unfinished_folder_broken_vectors_and_no_provenance_are_noted(
    tmp_path: Path,
) -> None:
    write_grid(tmp_path / 'maps', count=1, cells=1)
    (tmp_path / 'maps' / 'metadata.json').unlink()
    text = words(parse(write_report(tmp_path / 'maps', tmp_path / 'maps.html')))
    assert 'no metadata.json' in text
    gpd.GeoDataFrame(
        {'id': ['a', 'b'], 'embedding': [[1.0, np.nan], [1.0, 2.0]]},
        geometry=gpd.points_from_xy([179.9, -179.9], [0, 0]),
        crs='EPSG:4326',
    ).to_parquet(tmp_path / 'e.parquet')
    page = write_report(tmp_path / 'e.parquet', tmp_path / 'e.html')
    check_alone(page)
    text = words(parse(page))
    assert 'carries no provenance' in text
    assert '1 of 2 vectors have NaN' in text
    assert 'Dates not dated' in text
    assert 'Longitudes 179.9000°E to 179.9000°W Latitudes 0.0000° to 0.0000°' in text


def test_empty_run_has_a_page(tmp_path: Path) -> None:
    write_pooled(tmp_path / 'e.parquet', count=0)
    page = write_report(tmp_path / 'e.parquet', tmp_path / 'e.html')
    check_alone(page)
    assert 'holds no chips' in words(parse(page))


def test_page_does_not_grow_with_the_run(tmp_path: Path) -> None:
    count = 3000
    write_pooled(tmp_path / 'e.parquet', count=count, dimensions=4)
    page = write_report(tmp_path / 'e.parquet', tmp_path / 'e.html')
    assert f'Chips {count:,}' in words(parse(page))
    assert 'Drawn are 2,000 of 3,000 chips' in words(parse(page))
    assert page.stat().st_size < 1_000_000


def test_a_broken_list_of_failures_is_an_error(tmp_path: Path) -> None:
    write_pooled(tmp_path / 'e.parquet')
    (tmp_path / 'e.failures.parquet').write_text('text')
    with pytest.raises(SourceError, match='list of failures cannot be read'):
        write_report(tmp_path / 'e.parquet', tmp_path / 'e.html')


@pytest.mark.skipif(shutil.which('chromium') is None, reason='no chromium here')
def test_a_browser_shows_the_page(tmp_path: Path) -> None:
    # Far apart, and so too small to be seen without a thick outline.
    far = shapely.box(np.arange(12), 0, np.arange(12) + 0.01, 0.01)
    write_pooled(tmp_path / 'e.parquet', geometry=far)
    page = write_report(tmp_path / 'e.parquet', tmp_path / 'e.html')
    shot = tmp_path / 'shot.png'
    command = [
        *('chromium', '--headless', '--no-sandbox', '--disable-gpu', '--disable-quic'),
        *('--no-first-run', '--disable-background-networking', '--disable-sync'),
        *('--disable-component-update', f'--user-data-dir={tmp_path / "profile"}'),
        *(f'--screenshot={shot}', '--window-size=400,2400', '--dump-dom'),
        page.as_uri(),
    ]
    done = subprocess.run(
        command, check=True, capture_output=True, timeout=HANG, text=True
    )
    # Its script has run, though its policy forbids all others.
    assert re.search(r'<div class="tools"[^>]*>', page.read_text())[0].count('hidden')
    assert '<div class="tools" role="group" aria-label="Move the map">' in done.stdout
    with rasterio.open(shot) as picture:
        assert (picture.width, picture.height) == (400, 2400)
        # Text, lines and the colours of the map: not a blank page.
        pixels = np.unique(picture.read()[:3].reshape(3, -1), axis=1).T
        assert len(pixels) > 50
    (mark, *_) = [path for path in svg(page).iter(f'{SVG}path') if path.get('fill')]
    colour = [round(255 * value) for value in to_rgb(mark.get('fill', ''))]
    assert colour in pixels.tolist()
