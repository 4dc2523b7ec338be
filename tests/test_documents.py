"""Every code block of the README and of docs/ is run, or listed here."""

import ast
import itertools
import os
import re
import shutil
import subprocess
import sys
import types
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

import dynamicvis_geo
from dynamicvis_geo import cli
from tests.documents.blocks import PAGES, ROOT, Block, arguments, blocks
from tests.documents.fixtures import (
    earth,
    inputs,
    published_weights,
    small_backbones,
)
from tests.documents.material import MADE
from tests.earthengine_server import EarthEngineServer

__all__ = ('earth', 'inputs', 'published_weights', 'small_backbones')

#: Programs of others, and what needs a machine, network or account that tests lack.
NOT_RUN = {
    'make demo',
    'make test',
    'pip install .',
    "pip install '.[ray]'",
    "pip install '.[s3]'",
    "pip install '.[terratorch]'",
    "pip install '.[zarr]'",
    'earthengine authenticate',
    'earthengine set_project my-project',
    '.venv/bin/python -m tests.earthengine_server',
    'sbatch embed.slurm',
    'mkdir custom_modules',
    "echo 'import dynamicvis_geo.integrations.terratorch' > custom_modules/__init__.py",
    'terratorch fit -c fit.yaml',  # in tests/integrations/test_terratorch.py
    'python examples/ray_shards.py --shards 100 --gpus 1 -- --roi '
    's3://bucket/region.geojson --year 2022 --output s3://bucket/region.parquet',
}

#: Commands of ours that are read, not run: they start other processes, or need a store
#: or the official code. Tests of their own run such commands.
READ_ONLY = ('--devices', '--nodes', 's3://', 'verify')

#: Blocks that are no Python, console or YAML: language, page, and how many.
OTHER = {
    ('bash', 'running-at-scale.md'): 3,
    ('text', 'troubleshooting.md'): None,
    ('text', 'concepts.md'): 1,
}

_PROGRAM = r'dynamicvis-geo |dynamicvis_geo\.cli '

#: What the shell sees where it is not 0.
CODES = {'--on-missing skip': (0, 3), '--retry-failed': (0, 3)}

#: What pages find in their folder beside the inputs.
NEEDS = {
    'evaluating.md': ('plots.parquet', 'maps'),
    'pictures.md': ('embeddings.parquet', 'maps', 'plots.parquet'),
    'publishing.md': ('embeddings.parquet',),
    'similar.md': ('embeddings.parquet', 'maps', 'plots.parquet'),
    'running-at-scale.md': ('embeddings.parquet', 'maps'),
    'change.md': ('dates.parquet',),
    'concepts.md': ('embeddings.parquet', 'maps'),
}

#: Pages that have other packages load the published weights.
LOADS_WEIGHTS = ('timm.md', 'torchgeo.md')

#: Pages whose commands are those of others with more chips or dates.
LONG = ('change', 'embedding', 'evaluating', 'gallery', 'pictures', 'similar')

#: Pages that tests of their own run.
ELSEWHERE = ('study',)

RUN = [
    pytest.param(page, marks=pytest.mark.once) if page.stem in LONG else page
    for page in PAGES
    if page.stem not in ELSEWHERE
    and {'python', 'console'} & {b.language for b in blocks(page)}
]


@pytest.mark.usefixtures('earth', 'small_backbones')
@pytest.mark.parametrize('page', RUN, ids=lambda page: page.stem)
def test_page(
    page: Path,
    inputs: Path,
    tmp_path: Path,
    server: EarthEngineServer,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    if page.name in LOADS_WEIGHTS:
        request.getfixturevalue('published_weights')
    monkeypatch.chdir(inputs)
    for name in NEEDS.get(page.name, ()):
        if not Path(name).exists():
            assert cli.main([*MADE[name].split(), '--quiet']) == 0
    # What another page needed is not there for one that makes it.
    others = [f'{name}*' for name in MADE.keys() - set(NEEDS.get(page.name, ()))]
    ignored = shutil.ignore_patterns(*others)
    shutil.copytree(inputs, tmp_path, ignore=ignored, dirs_exist_ok=True)
    shutil.copytree(ROOT / 'examples', tmp_path / 'examples')
    monkeypatch.chdir(tmp_path)
    # A module of its own, so that what a page defines can be pickled.
    module = types.ModuleType('__page__')
    monkeypatch.setitem(sys.modules, '__page__', module)
    for block in blocks(page):
        where = f'{page.name}:{block.line}'
        if block.language == 'python':
            if missing(block.code):
                continue
            lines = '\n' * (block.line - 1)
            exec(compile(lines + block.code, str(page), 'exec'), vars(module))
        elif block.language == 'console':
            for command in block.commands:
                run(command, where, server.url)
        elif block.language == 'yaml':
            check_yaml(block, tmp_path / f'block-{block.line}.yaml')


def missing(text: str) -> bool:
    """Tell if what is written is for a framework that is not installed."""
    names = re.findall(r'dynamicvis_geo\.integrations\.(\w+)', text)
    return any(find_spec(name) is None for name in names)


def run(command: str, where: str, url: str) -> None:
    given = arguments(command.replace('http://127.0.0.1:PORT', url))
    if given is None:
        assert command in NOT_RUN, f'{where}: run or list {command!r}'
        return
    if any(word in part for word in READ_ONLY for part in given):
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
    content = yaml.safe_load(block.code)
    if content.get('kind') == 'Job':
        (container,) = content['spec']['template']['spec']['containers']
        script = container['command'][-1]
        subprocess.run(['bash', '-n'], input=script, text=True, check=True)
        given = re.split(_PROGRAM, script)[1].partition('||')[0]
        cli._parse(given.split())
    if 'writer' in content:
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
        (ours,) = (line for line in block.commands if re.search(_PROGRAM, line))
        given = re.split(_PROGRAM, ours)[1]
        cli._parse(given.split())


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


#: Pages of the reference that show a module as it explains itself.
MODULES = ('dynamicvis_geo.errors', 'dynamicvis_geo.evaluation.metrics')


def test_reference_has_public_names() -> None:
    """Headings are what one imports, and nothing that the package has is left out."""
    pages = sorted((ROOT / 'docs' / 'reference').glob('*.md'))
    names = [
        name
        for page in pages
        for name in re.findall(r'^::: (\S+)$', page.read_text('utf-8'), re.MULTILINE)
    ]
    assert len(set(names)) == len(names)
    for name in itertools.filterfalse(missing, names):
        module, _, last = name.rpartition('.')
        found = import_module(module)
        listed = getattr(found, '__all__', dir(found))
        assert last in listed or name in MODULES, name
    assert {f'dynamicvis_geo.{name}' for name in dynamicvis_geo.__all__} <= set(names)


def test_documentation_is_built(tmp_path: Path) -> None:
    """Links, anchors, and the docstrings of the reference."""
    subprocess.run(
        [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--site-dir', tmp_path],
        cwd=ROOT,
        env={**os.environ, 'NO_MKDOCS_2_WARNING': '1'},
        check=True,
    )
    page = (tmp_path / 'reference' / 'callbacks.html').read_text(encoding='utf-8')
    assert 'block_chips' in page
    page = (tmp_path / 'reference' / 'commands.html').read_text(encoding='utf-8')
    assert '--retry-failed' in page
    assert '--partial' in page
    for path in tmp_path.rglob('*.html'):
        text = path.read_text(encoding='utf-8')
        assert not re.search(r'<(script|link|img)[^>]*(src|href)="https?:', text), path
