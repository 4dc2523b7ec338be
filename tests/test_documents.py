"""Every code block of the README and of docs/ is run, or listed here."""

import ast
import shutil
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import ee
import ee.deprecation
import google.auth.credentials
import pytest
import torch
import yaml

from dynamicvis_geo import cli
from dynamicvis_geo.models import BackboneConfig, weights
from tests.documents.blocks import PAGES, ROOT, Block, arguments, blocks
from tests.documents.material import MADE, write_inputs
from tests.earthengine_server import EarthEngineServer
from tests.earthengine_server.fixtures import running_server, server

__all__ = ('running_server', 'server')

#: Programs of others, and what needs a machine, a network or an account that tests lack.
NOT_RUN = {
    'make demo',
    'make test',
    'make docs',
    'pip install .',
    "pip install 'dynamicvis-geo[zarr]'",
    "pip install 'dynamicvis-geo[upstream]'",
    'earthengine authenticate',
    'earthengine authenticate --auth_mode=notebook',
    'earthengine set_project my-project',
    '.venv/bin/python -m tests.earthengine_server',
    'sbatch embed.slurm',
    'export EARTHENGINE_PROJECT=my-project',
}

#: Commands of ours that are read, not run: they start other processes, or need the
#: official code. Tests of their own run such commands.
READ_ONLY = ('--devices', '--nodes', 'verify')

#: Blocks that are no Python, console or YAML: language, page, and how many.
OTHER = {
    ('bash', 'running-at-scale.md'): 2,
    ('text', 'running-at-scale.md'): 1,
    ('text', 'troubleshooting.md'): None,
    ('text', 'concepts.md'): 1,
}

#: What the shell sees where it is not 0.
CODES = {'--on-missing skip': (0, 3), '--retry-failed': (0, 3)}

#: What pages find in their folder beside the inputs.
NEEDS = {
    'evaluating.md': ('plots.parquet', 'maps'),
    'pictures.md': ('embeddings.parquet', 'maps', 'plots.parquet'),
    'running-at-scale.md': ('embeddings.parquet', 'maps'),
    'concepts.md': ('embeddings.parquet', 'maps'),
}

RUN = [page for page in PAGES if {'python', 'console'} & {b.language for b in blocks(page)}]


@pytest.fixture(scope='session')
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('inputs')
    write_inputs(folder)
    return folder


@pytest.fixture
def earth(
    server: EarthEngineServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[EarthEngineServer]:
    """Earth Engine as a user has it who is logged in: it is the server."""
    nothing = ee.deprecation.DeprecatedAsset('', None, None, None)
    monkeypatch.setattr(ee.deprecation, 'deprecated_assets', {'': nothing})
    ee.Reset()
    anonymous = google.auth.credentials.AnonymousCredentials()
    ee.Initialize(anonymous, project='my-project', url=server.url)
    yield server
    ee.Reset()


@pytest.fixture
def small_backbones(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every backbone is untrained and takes small images."""
    make = weights._random_backbone

    def small(config: BackboneConfig) -> object:
        return make(replace(config, weights='random', checkpoint=None, img_size=64))

    monkeypatch.setattr(weights, '_random_backbone', small)
    monkeypatch.setattr(weights, '_pretrained_backbone', small)
    monkeypatch.setattr('dynamicvis_geo.embedding._loaded', [])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    show, filters = warnings.showwarning, warnings.filters[:]
    yield
    warnings.showwarning = show
    warnings.filters[:] = filters
    torch.set_num_threads(threads)


@pytest.mark.usefixtures('earth', 'small_backbones')
@pytest.mark.parametrize('page', RUN, ids=lambda page: page.stem)
def test_page(
    page: Path,
    inputs: Path,
    tmp_path: Path,
    server: EarthEngineServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(inputs)
    for name in NEEDS.get(page.name, ()):
        if not Path(name).exists():
            assert cli.main([*MADE[name].split(), '--quiet']) == 0
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    shutil.copytree(ROOT / 'examples', tmp_path / 'examples')
    monkeypatch.chdir(tmp_path)
    # A module of its own, so that what a page defines can be pickled.
    module = types.ModuleType('__page__')
    monkeypatch.setitem(sys.modules, '__page__', module)
    for block in blocks(page):
        where = f'{page.name}:{block.line}'
        if block.language == 'python':
            lines = '\n' * (block.line - 1)
            exec(compile(lines + block.code, str(page), 'exec'), vars(module))
        elif block.language == 'console':
            for command in block.commands:
                run(command, where, server.url)
        elif block.language == 'yaml':
            check_yaml(block, tmp_path / f'block-{block.line}.yaml')


def run(command: str, where: str, url: str) -> None:
    given = arguments(command.replace('http://127.0.0.1:PORT', url))
    if given is None:
        assert command in NOT_RUN, f'{where}: run or list {command!r}'
        return
    if any(word in given for word in READ_ONLY):
        cli._parse(given)
        return
    codes = [codes for words, codes in CODES.items() if words in command]
    try:
        code = cli.main(given)
    except SystemExit as end:
        code = int(end.code or 0)
    assert code in (codes[0] if codes else (0,)), f'{where}: {command}'


def check_yaml(block: Block, path: Path) -> None:
    path.write_text(block.code)
    if 'writer' in yaml.safe_load(block.code):
        with pytest.raises(SystemExit) as end:
            cli.main(['predict', '--config', str(path), '--print_config'])
        assert not end.value.code


def test_no_block_is_forgotten() -> None:
    found: dict[tuple[str, str], int] = {}
    for page in PAGES:
        for block in blocks(page):
            if block.language not in ('python', 'console', 'yaml'):
                key = (block.language, page.name)
                found[key] = found.get(key, 0) + 1
    assert found.keys() == OTHER.keys()
    for key, count in OTHER.items():
        assert count in (None, found[key]), key


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_scripts_are_bash(page: Path) -> None:
    for block in blocks(page):
        if block.language != 'bash':
            continue
        subprocess.run(['bash', '-n'], input=block.code, text=True, check=True)
        ours = [line for line in block.commands if 'dynamicvis-geo' in line]
        assert ours
        for line in ours:
            words = line.partition('dynamicvis-geo ')[2]
            cli._parse(words.split())


def test_messages_are_those_of_the_code() -> None:
    """Words between the dots of a quoted message stand in the source."""
    known = set()
    for path in (ROOT / 'dynamicvis_geo').rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                known.add(' '.join(node.value.split()))
    page = ROOT / 'docs' / 'troubleshooting.md'
    for block in blocks(page):
        if block.language != 'text':
            continue
        for part in ' '.join(block.code.split()).split('...'):
            words = part.strip()
            assert any(words in text for text in known), f'line {block.line}: {words!r}'
