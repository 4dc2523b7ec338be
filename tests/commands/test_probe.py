"""`probe` and `predict-map`, from labels to maps."""

import json
import re
import shutil
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import rasterio
import torch
from lightning.pytorch import LightningModule, Trainer
from rasterio.transform import from_origin
from torch import Tensor
from torch.utils.data import DataLoader
from upath import UPath

from dynamicvis_geo import EmbeddingWriter
from dynamicvis_geo.cli import main
from dynamicvis_geo.provenance import read_provenance
from dynamicvis_geo.tasks import load_probe
from tests.callbacks.standins import Chips
from tests.stores import Upload

RunCli = Callable[..., tuple[int, str, str]]
COVERS = ('bare', 'forest', 'water')


class Covers(LightningModule):
    """Features of chips that tell their cover: chip i has COVERS[i % 3]."""

    def __init__(self, output: str = 'pooled') -> None:
        super().__init__()
        self.output = output
        self.embedding_dim = 6
        self.provenance: dict[str, Any] = {
            'backbone': {'weights': 'random', 'seed': 0},
            'preprocessing': {'input_range': [0, 10000]},
            'output': output,
            'pooling': 'featmap_mean' if output == 'pooled' else None,
        }
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        chip = batch['chip'].reshape(-1)
        generator = torch.Generator().manual_seed(batch_idx)
        noise = torch.randn(len(chip), 6, generator=generator)
        features = 4 * torch.eye(6)[chip % 3] + 0.3 * noise
        if self.output == 'grid':
            features = features[..., None, None].expand(-1, -1, 2, 2).contiguous()
        return {'embedding': features, 'chip': batch['chip']}


def embed(path: Path, module: Covers, count: int) -> None:
    Trainer(
        accelerator='cpu',
        callbacks=[EmbeddingWriter(path)],
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    ).predict(module, DataLoader(Chips(count), batch_size=64), return_predictions=False)


@pytest.fixture(scope='module')
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp('probe')
    embed(folder / 'e.parquet', Covers(), 150)
    embed(folder / 'maps', Covers('grid'), 3)
    ids = [f'chip-{i}' for i in range(140)]
    table = pd.DataFrame({'id': ids, 'cover': [COVERS[i % 3] for i in range(140)]})
    table['height'] = 10.0 * (table.index % 3) + np.linspace(0, 1, 140)
    table['kinds'] = [f'{COVERS[i % 3]};land' for i in range(140)]
    table['same'] = 'x'
    table.loc[len(table)] = ['elsewhere', 'bare', 1.0, 'bare', 'x']
    table.loc[len(table)] = ['chip-145', None, None, None, None]
    table.to_csv(folder / 'labels.csv', index=False)
    return folder


def command(folder: Path | UPath, *further: str | Path) -> list[str]:
    """A probe of the files in a folder."""
    labels = ('--labels', folder / 'labels.csv', '--target', 'cover')
    shared = ('--seed', '1', '--epochs', '6')
    return list(map(str, ('probe', folder / 'e.parquet', *labels, *shared, *further)))


@pytest.fixture(scope='module')
def probed(files: Path) -> tuple[Path, str]:
    """A folder of results, and what was printed."""
    output = files / 'new' / 'out'
    with redirect_stdout(StringIO()) as out, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert main(command(files, '--output', output)) == 0
    return output, out.getvalue()


def test_from_labels_to_maps(
    files: Path, probed: tuple[Path, str], run_cli: RunCli, tmp_path: Path
) -> None:
    output, out = probed
    assert 'Joined by id: 140 of 150 chips have a label; 1 labels belong' in out
    assert 'and 1 have no value' in out
    (divided,) = re.findall(
        r'140 plots of 3 classes; (.*) \(split spatial, (.*)\)', out
    )
    assert divided[1] == 'blocks of 1 km, chosen from the places'
    assert '--split spatial' not in out
    lines = out.splitlines()
    # A row each method; and each but the baseline, less it.
    assert sum('[' in line for line in lines) == 7 + 6
    assert 'accuracy_micro less that of the baselines' in out
    assert 'Choose the row before you look' in out
    assert 'predictions.parquet (of the linear probe), probe.ckpt' in lines[-1]
    assert 'Note: the features are those of random weights' in out
    assert any(line.split()[:2] == ['baseline', 'largest'] for line in lines)
    assert (
        out.index('F1 of each class') < out.index('\nforest ') < out.index('\nwater ')
    )
    row, less = (line for line in lines if 'linear probe' in line and '[' in line)
    assert '1.000 [1.000, 1.000]' in row
    assert '[+0.' in less
    assert {path.name for path in output.iterdir()} == {
        *('results.json', 'results.csv', 'classes.csv', 'probe.ckpt'),
        'predictions.parquet',
        *('confusion-logistic.png', 'confusion-linear-probe.png'),
    }
    assert [path.name for path in output.parent.iterdir()] == ['out']
    content = json.loads((output / 'results.json').read_text())
    assert content['classes'] == list(COVERS)
    told = [int(count) for count in re.findall(r'\d+', divided[0])]
    assert list(content['splits'].values()) == told
    assert sum(told) == 140
    assert content['split']['kind'] == 'spatial'
    assert content['split']['block_m'] == 1000
    assert content['groups']['by'] == 'block'
    assert f'from {content["groups"]["test"]} blocks of the test split' in out
    assert content['target'] == 'cover'
    assert content['features']['model']['pooling'] == 'featmap_mean'
    table = pd.read_csv(output / 'results.csv')
    assert set(table['method']) == {'baseline', 'knn', 'logistic', 'linear probe'}
    classes = pd.read_csv(output / 'classes.csv')
    assert set(classes['class']) == set(COVERS)
    plots = gpd.read_parquet(output / 'predictions.parquet')
    assert plots['split'].value_counts().to_dict() == content['splits']
    cover = [COVERS[int(name.removeprefix('chip-')) % 3] for name in plots['id']]
    assert plots['label'].tolist() == cover
    tested = plots['split'] == 'test'
    assert plots['prediction'].notna().tolist() == tested.tolist()
    assert (plots['prediction'] == plots['label'])[tested].all()
    assert plots['correct'][tested].all()
    assert read_provenance(output / 'predictions.parquet') == content['features']
    probe = load_probe(output / 'probe.ckpt')
    assert probe.provenance == content['features']

    code, out, err = run_cli(
        'predict-map', output / 'probe.ckpt', files / 'maps', '--output', tmp_path / 'm'
    )
    assert code == 0, err
    assert 'pooled features' in err
    assert out == f'Wrote {tmp_path / "m"}: 3 maps.\n'
    for i in range(3):
        with rasterio.open(tmp_path / 'm' / f'chip-{i}.tif') as image:
            assert (image.read(1) == i).all()
            assert image.tags()[f'class_{i}'] == COVERS[i]
    code, out, _ = run_cli(
        'predict-map', output / 'probe.ckpt', files / 'maps', '--output', tmp_path / 'm'
    )
    assert '0 maps; 3 were there already' in out


@pytest.mark.filterwarnings('ignore:.*have a label')
def test_report_shows_the_scores_of_its_input_only(
    files: Path, probed: tuple[Path, str], run_cli: RunCli, tmp_path: Path
) -> None:
    page = tmp_path / 'page.html'
    further = ('--probe', probed[0], '--output', page)
    code, _, err = run_cli('report', files / 'e.parquet', *further)
    assert (code, err) == (0, '')
    text = page.read_text()
    assert 'How much the features know of cover' in text
    assert 'scores say nothing of DynamicVis' in text
    assert text.count('<svg') == 2
    code, _, err = run_cli('report', files / 'maps', *further, '--overwrite')
    assert code == 2
    assert 'these results are of other features' in err
    assert page.read_text() == text


def test_numbers_several_classes_and_a_column_of_splits(
    files: Path, run_cli: RunCli, tmp_path: Path
) -> None:
    labels = pd.read_csv(files / 'labels.csv').set_index('id')[:140]
    table = gpd.read_parquet(files / 'e.parquet').set_index('id').loc[labels.index]
    places = table[['centre_lon', 'centre_lat']].set_axis(['lon', 'lat'], axis=1)
    places = places.assign(
        height=labels['height'].to_numpy(),
        kinds=labels['kinds'].to_numpy(),
        part=['train', 'train', 'val', 'test', 'test'] * 28,
    )
    places.to_csv(tmp_path / 'plots.csv', index=False)
    shared = (
        *('probe', files / 'e.parquet', '--labels', tmp_path / 'plots.csv'),
        *('--split', 'part', '--join', 'within', '--epochs', '2'),
    )
    code, out, err = run_cli(
        *shared, '--target', 'height', '--output', tmp_path / 'height'
    )
    assert code == 0, err
    assert 'Regression, height: 140 plots; 56 to train, 28 to validate' in out
    assert '--split spatial' not in out
    results = pd.read_csv(tmp_path / 'height' / 'results.csv')
    ridge = results[(results['method'] == 'ridge') & (results['metric'] == 'r2')]
    assert ridge['value'].iloc[0] > 0.9
    assert (tmp_path / 'height' / 'predicted-ridge.png').exists()
    plots = gpd.read_parquet(tmp_path / 'height' / 'predictions.parquet')
    errors = (plots['prediction'] - plots['label']).dropna()
    np.testing.assert_allclose(plots['error'].dropna(), errors, atol=1e-6)
    assert (len(errors), plots['split'].iloc[errors.index].unique()) == (56, 'test')

    code, out, err = run_cli(
        *(*shared, '--target', 'kinds', '--task', 'multilabel'),
        *('--output', tmp_path / 'kinds', '--standardize', 'batchnorm'),
    )
    assert code == 0, err
    assert 'Multilabel, kinds: 140 plots of 4 classes' in out
    assert load_probe(tmp_path / 'kinds' / 'probe.ckpt').standardize == 'batchnorm'
    assert not list((tmp_path / 'kinds').glob('*.png'))
    plots = gpd.read_parquet(tmp_path / 'kinds' / 'predictions.parquet')
    assert plots['label'][plots['id'] == 'chip-1'].tolist() == ['forest;land']
    assert plots['prediction'].count() == 56


def test_mean_colours_of_images_are_a_baseline(
    files: Path, run_cli: RunCli, tmp_path: Path
) -> None:
    # Chips of 320 m side by side; the image of chip i is as bright as its cover, and
    # that of the last ones is missing.
    table = gpd.read_parquet(files / 'e.parquet')
    count = 130
    pixels = np.repeat(np.arange(count) % 3, 4)[None, None].repeat(4, 1).repeat(3, 0)
    with rasterio.open(
        tmp_path / 'scene.tif',
        'w',
        driver='GTiff',
        dtype='float32',
        count=3,
        height=4,
        width=4 * count,
        crs=table['crs'].iloc[0],
        transform=from_origin(table['minx'].min(), table['maxy'].max(), 80, 80),
    ) as file:
        file.write((pixels + 1).astype('float32'))
    code, _, err = run_cli(
        *command(files, '--output', tmp_path / 'out'),
        *('--images', tmp_path / 'scene.tif', '--split', 'random'),
    )
    assert code == 0, err
    assert '10 of 140 chips have no image' in err
    results = pd.read_csv(tmp_path / 'out' / 'results.csv')
    colour = results[results['setting'] == 'mean colour'].set_index('metric')
    assert colour['value']['accuracy_micro'] > 0.85
    assert not list((tmp_path / 'out').glob('*baseline*'))


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (('--target', 'cover', '--images', 'nowhere.tif'), 'nowhere.tif'),
        (('--target', 'colour'), "no column 'colour'"),
        (('--target', 'same'), '1 class'),
        (('--target', 'cover', '--split', 'fold'), 'fold'),
        (('--target', 'cover', '--split', 'spatial', '--block', '1e6'), 'block'),
        (('--target', 'cover', '--fractions', '1,2'), "'1,2' must be three"),
        (('--target', 'cover', '--fractions', '.9,.1,0'), "'test'"),
        (('--target', 'cover', '--join', 'nearest'), '--max-distance'),
        (('--target', 'cover', '--labels', 'nowhere.csv'), 'nowhere.csv'),
        (('--target', 'cover', '--output', '{files}'), '--overwrite'),
        (('--target', 'cover', '--output', '{files}/e.parquet'), 'it is a file'),
    ],
)
@pytest.mark.filterwarnings('ignore:.*have a label')
def test_bad_input_is_one_line_and_leaves_nothing(
    files: Path,
    run_cli: RunCli,
    tmp_path: Path,
    arguments: tuple[str, ...],
    words: str,
) -> None:
    arguments = tuple(argument.format(files=files) for argument in arguments)
    code, _, err = run_cli(
        *('probe', files / 'e.parquet', '--labels', files / 'labels.csv'),
        *('--output', tmp_path / 'out', *arguments),
    )
    assert code == 2
    assert words in err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_results_are_replaced_when_asked(
    files: Path, probed: tuple[Path, str], run_cli: RunCli, tmp_path: Path
) -> None:
    again = command(files, '--output', tmp_path / 'out')
    others = tmp_path / 'out'
    others.mkdir()
    (others / 'results.csv').write_text('old')
    assert run_cli(*again)[0] == 2
    # Not ours: there is no results.json that says so.
    assert run_cli(*again, '--overwrite')[0] == 2
    assert (others / 'results.csv').read_text() == 'old'
    shutil.rmtree(others)
    shutil.copytree(probed[0], others)
    (others / 'results.csv').write_text('old')
    (others / 'notes.txt').write_text('mine')
    assert run_cli(*again)[0] == 2
    assert run_cli(*again, '--overwrite')[0] == 0
    for name in ('results.csv', 'notes.txt'):
        expected = 'mine' if name == 'notes.txt' else (probed[0] / name).read_text()
        assert (others / name).read_text() == expected


def test_embeddings_and_labels_of_a_store(
    files: Path,
    probed: tuple[Path, str],
    run_cli: RunCli,
    tmp_path: Path,
    upload: Upload,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    upload(files / 'labels.csv')
    folder = upload(files / 'e.parquet').parent
    code, _, err = run_cli(*command(folder, '--output', tmp_path / 'out'))
    assert code == 0, err
    table = (tmp_path / 'out' / 'results.csv').read_text()
    assert table == (probed[0] / 'results.csv').read_text()
