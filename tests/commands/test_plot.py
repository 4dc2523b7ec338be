from collections.abc import Callable
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import rasterio
from PIL import Image

from tests.commands.conftest import MakeScene
from tests.evaluation.test_class_pictures import write_map
from tests.outputs import write_grid, write_pooled
from tests.stores import Upload

Cli = Callable[..., tuple[int, str, str]]


def colours(path: Path) -> int:
    return len(Image.open(path).convert('RGB').getcolors(1 << 24) or [])


def test_images_are_drawn_alone_and_as_a_sheet(
    run_cli: Cli, make_scene: MakeScene, tmp_path: Path
) -> None:
    make_scene('scenes/one.tif')
    make_scene('scenes/two.tif')
    output = tmp_path / 'new' / 'one.png'
    code, out, err = run_cli(
        'plot', 'rgb', tmp_path / 'scenes/one.tif', '--output', output
    )
    assert (code, err) == (0, '')
    assert str(output) in out
    assert colours(output) > 1000
    code, _, _ = run_cli(
        'plot', 'rgb', tmp_path / 'scenes', '--output', tmp_path / 'sheet.pdf'
    )
    assert code == 0
    assert (tmp_path / 'sheet.pdf').read_bytes().startswith(b'%PDF')


def test_a_chip_of_a_cache_is_drawn(
    run_cli: Cli, make_scene: MakeScene, tmp_path: Path
) -> None:
    make_scene(f'chips/ab/chip_1_{"ab" * 16}.tif')
    output = tmp_path / 'chip.svg'
    arguments = ('plot', 'rgb', tmp_path / 'chips', '--output', output, '--chip')
    assert run_cli(*arguments, 'chip_1')[0] == 0
    assert '<svg' in output.read_text()
    code, _, err = run_cli(*arguments, 'chip_2', '--overwrite')
    assert code == 2
    assert 'cache of 1 chips, such as chip_1' in err
    scene = make_scene('scene.tif')
    _, _, err = run_cli(*arguments[:2], scene, *arguments[3:], 'a', '--overwrite')
    assert 'is no cache of chips: leave --chip out' in err


def test_maps_in_colour_are_a_picture_a_folder_or_a_geotiff(
    run_cli: Cli, tmp_path: Path
) -> None:
    write_grid(tmp_path / 'maps')
    maps = tmp_path / 'maps'
    one = sorted(maps.glob('*.tif'))[0]
    assert run_cli('plot', 'pca', maps, '--output', tmp_path / 'maps.png')[0] == 0
    assert colours(tmp_path / 'maps.png') > 30
    code, out, _ = run_cli('plot', 'pca', maps, '--output', tmp_path / 'colours')
    assert (code, '4 GeoTIFFs' in out) == (0, True)
    assert run_cli('plot', 'pca', one, '--output', tmp_path / 'one.tif')[0] == 0
    for path in (tmp_path / 'one.tif', tmp_path / 'colours' / one.name):
        with rasterio.open(path) as file:
            assert file.count == 3
    for output, message in (
        (maps, 'not empty'),
        (tmp_path / 'colours', 'not empty'),
        (tmp_path / 'all.tif', 'one file for the 4 maps'),
        (tmp_path / 'maps.jpg', '.jpg is unknown'),
        (tmp_path / 'maps.png', 'exists'),
    ):
        code, _, err = run_cli('plot', 'pca', maps, '--output', output)
        assert (code, message in err) == (2, True)
    code, _, err = run_cli('plot', 'pca', maps, '--output', maps, '--overwrite')
    assert (code, 'holds the feature maps' in err) == (2, True)
    code, _, err = run_cli('plot', 'pca', one, '--output', one, '--overwrite')
    assert (code, 'is the input' in err) == (2, True)


def test_neighbours_are_drawn_and_listed(run_cli: Cli, tmp_path: Path) -> None:
    embedding = write_pooled(tmp_path / 'e.parquet')
    output = tmp_path / 'n.png'
    code, out, _ = run_cli(
        *('plot', 'neighbours', tmp_path / 'e.parquet', '--chip', 'chip-3', '-k', '2'),
        *('--output', output),
    )
    assert code == 0
    unit = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    similarity = unit @ unit[3]
    best = np.argsort(-similarity)[1:3]
    listed = [line.split() for line in out.splitlines()[-2:]]
    assert listed == [[f'{similarity[i]:.4f}', f'chip-{i}'] for i in best]
    assert Image.open(output).width > 400


def test_a_map_is_drawn(run_cli: Cli, tmp_path: Path) -> None:
    write_pooled(tmp_path / 'e.parquet')
    arguments = ('plot', 'map', tmp_path / 'e.parquet', '--output', tmp_path / 'm.png')
    assert run_cli(*arguments, '--method', 'pca')[0] == 0
    assert colours(tmp_path / 'm.png') > 12
    code, _, err = run_cli(*arguments, '--method', 'pca')
    assert (code, '--overwrite' in err) == (2, True)


def test_columns_are_mapped(run_cli: Cli, tmp_path: Path) -> None:
    cover = ['water', 'trees', None] * 4
    write_pooled(tmp_path / 'e.parquet', cover=cover)
    table = gpd.read_parquet(tmp_path / 'e.parquet').drop(columns='embedding')
    table.to_crs(3857).to_parquet(tmp_path / 'found.parquet')
    places = table[['id', 'centre_lon', 'centre_lat']].set_axis(
        ['id', 'lon', 'lat'], axis=1
    )
    places.assign(height=np.linspace(0, 1, 12)).iloc[:9].to_csv(tmp_path / 'p.csv')
    (tmp_path / 'colours.csv').write_text('name,color\nwater,#123456\n')
    given = ('--color', 'cover', '--class-colors', tmp_path / 'colours.csv')
    for source in ('e.parquet', 'found.parquet'):
        output = tmp_path / f'{source}.png'
        code, _, err = run_cli(
            'plot', 'map', tmp_path / source, *given, '--output', output
        )
        assert code == 0, err
        drawn = Image.open(output).convert('RGB').getcolors(1 << 24) or []
        assert max(n for n, colour in drawn if colour == (0x12, 0x34, 0x56)) > 1000
    for source, labels in (
        ('p.csv', ()),
        ('e.parquet', ('--labels', tmp_path / 'p.csv')),
    ):
        output = tmp_path / f'{source}-height.png'
        arguments = (tmp_path / source, '--color', 'height', *labels)
        code, out, err = run_cli('plot', 'map', *arguments, '--output', output)
        assert code == 0, err
        assert ('9 of 12 chips have a label' in out) == bool(labels)
        assert output.exists()


def test_random_weights_are_said_of_what_comes_from_features(
    run_cli: Cli, tmp_path: Path
) -> None:
    random = {'model': {'backbone': {'weights': 'random'}}}
    columns = {'cover': ['water', 'trees'] * 6, 'similarity': np.linspace(0, 1, 12)}
    write_pooled(tmp_path / 'e.parquet', provenance=random, **columns)
    for column, said in (('similarity', True), ('cover', False)):
        output = tmp_path / f'{column}.svg'
        arguments = ('plot', 'map', tmp_path / 'e.parquet', '--color', column)
        assert run_cli(*arguments, '--output', output)[0] == 0
        assert ('random weights' in output.read_text()) == said


def test_class_maps_are_drawn_in_chosen_colours(run_cli: Cli, tmp_path: Path) -> None:
    write_map(tmp_path / 'maps' / 'a.tif', np.array([[[0, 0, 1, 2]]], np.uint8))
    (tmp_path / 'c.csv').write_text('name,color\nwater,#123456\n')
    output = tmp_path / 'c.png'
    arguments = ('plot', 'classes', tmp_path / 'maps', '--output', output)
    code, out, err = run_cli(*arguments, '--class-colors', tmp_path / 'c.csv')
    assert code == 0, err
    assert '50.00 %  water' in out
    counted = Image.open(output).convert('RGB').getcolors(1 << 24) or []
    assert max(n for n, colour in counted if colour == (0x12, 0x34, 0x56)) > 9000
    (tmp_path / 'c.csv').write_text('name,color\nwater,blu\n')
    again = (*arguments, '--overwrite', '--class-colors', tmp_path / 'c.csv')
    code, _, err = run_cli(*again)
    assert (code, 'c.csv, line 2' in err) == (2, True)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('classes', 'maps', '--output', 'm.png'), '6 bands and 0 names of classes'),
        (('map', 'maps', '--output', 'm.png'), 'holds grid features'),
        (('map', 'p.csv', '--output', 'm.png'), 'has no embeddings: name the column'),
        (
            ('map', 'e.parquet', '--output', 'm.png', '--color', 'colour'),
            '--color colour: no such column; there are id, ',
        ),
        (
            ('map', 'e.parquet', '--output', 'm.png', '--labels', 'e.parquet'),
            '--labels e.parquet needs --color',
        ),
        (
            (
                'map',
                'e.parquet',
                '--output',
                'm.png',
                '--color',
                'crs',
                '--method',
                'pca',
            ),
            '--method pca is of the colours of embeddings',
        ),
        (('pca', 'e.parquet', '--output', 'm.png'), 'holds pooled features'),
        (('map', 'empty.parquet', '--output', 'm.png'), 'holds no chips'),
        (('map', 'none.parquet', '--output', 'm.png'), 'no such file'),
        (('pca', 'none', '--output', 'm'), 'no such file'),
        (('map', 'e.parquet', '--output', 'm.gif'), 'must end in .png, .pdf or .svg'),
        (('map', 'e.parquet', '--output', 'e.parquet'), 'must end in'),
        (
            ('neighbours', 'e.parquet', '--chip', 'x', '--output', 'm.png'),
            "'x' is none of the 12 chips, such as chip-0",
        ),
    ],
)
def test_what_cannot_be_drawn_is_said(
    run_cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    write_pooled(tmp_path / 'e.parquet')
    write_pooled(tmp_path / 'empty.parquet', count=0)
    write_grid(tmp_path / 'maps')
    (tmp_path / 'p.csv').write_text('lon,lat,cover\n10,47,water\n')
    monkeypatch.chdir(tmp_path)
    code, _, err = run_cli('plot', *arguments)
    assert code == 2
    assert message in err
    assert not (tmp_path / 'm.png').exists()


def test_help_has_examples(run_cli: Cli) -> None:
    for kind in ('rgb', 'pca', 'neighbours', 'map', 'classes'):
        code, out, _ = run_cli('plot', kind, '--help')
        assert code == 0
        assert f'dynamicvis-geo plot {kind}' in out.partition('examples:')[2]


def test_report_is_written_beside_the_output(run_cli: Cli, tmp_path: Path) -> None:
    write_pooled(tmp_path / 'e.parquet')
    code, out, _ = run_cli('report', tmp_path / 'e.parquet')
    assert code == 0
    page = tmp_path / 'e.report.html'
    assert str(page) in out
    assert page.exists()
    code, _, err = run_cli('report', tmp_path / 'e.parquet')
    assert (code, '--overwrite' in err) == (2, True)
    code, _, err = run_cli('report', tmp_path / 'e.parquet', '--output', 'page.txt')
    assert (code, 'must end in .html' in err) == (2, True)
    assert run_cli('report', tmp_path / 'e.parquet', '--overwrite')[0] == 0


def test_what_embed_writes_can_be_reported_and_drawn(
    run_cli: Cli, make_scene: MakeScene, tmp_path: Path
) -> None:
    scene = make_scene()
    for name, options in (('e.parquet', ()), ('maps', ('--grid',))):
        code, _, err = run_cli(
            *('embed', scene, '--size', '64', '--weights', 'random', *options),
            *('--output', tmp_path / name),
        )
        assert code == 0, err
        code, _, err = run_cli('report', tmp_path / name, '--images', scene)
        assert code == 0, err
    for stem in ('e', 'maps'):
        text = (tmp_path / f'{stem}.report.html').read_text()
        assert 'The weights are random' in text
        assert '<td>6</td>' in text
        assert 'alt="Image of chip EPSG32633_x384000' in text
    code, out, err = run_cli(
        *('plot', 'neighbours', tmp_path / 'e.parquet', '--chip', '0', '-k', '3'),
        *('--images', scene, '--output', tmp_path / 'n.png'),
    )
    assert code == 0, err
    assert out.count('EPSG32633_x') == 3


def test_outputs_of_stores_are_drawn(
    run_cli: Cli, make_scene: MakeScene, tmp_path: Path, upload: Upload
) -> None:
    make_scene('scenes/one.tif')
    make_scene('scenes/two.tif')
    write_grid(tmp_path / 'maps')
    write_pooled(tmp_path / 'e.parquet')
    scenes, maps = upload(tmp_path / 'scenes'), upload(tmp_path / 'maps')
    table = upload(tmp_path / 'e.parquet')
    for i, arguments in enumerate(
        (
            ('plot', 'rgb', scenes),
            ('plot', 'rgb', f'/vsis3/{scenes.path}/one.tif'),
            ('plot', 'pca', maps),
            ('plot', 'map', table),
            ('plot', 'neighbours', table, '--chip', '0', '--images', scenes),
        )
    ):
        output = tmp_path / f'{i}.png'
        code, _, err = run_cli(*arguments, '--output', output)
        assert code == 0, err
        assert colours(output) > 10
    code, out, err = run_cli('plot', 'pca', maps, '--output', tmp_path / 'colours')
    assert (code, '4 GeoTIFFs' in out) == (0, True), err
    for source in (maps, table):
        page = tmp_path / f'{source.name}.html'
        code, _, err = run_cli('report', source, '--output', page)
        assert code == 0, err
        assert str(source.name) in page.read_text()
    code, _, err = run_cli('report', table)
    assert (code, '--output is needed' in err) == (2, True)
