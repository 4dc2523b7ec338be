"""What `make dist` builds is complete, and installs where nothing else is."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from readme_renderer import markdown

import dynamicvis_geo
from tests.documents.blocks import ROOT

pytestmark = pytest.mark.once

PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text('utf-8'))['project']

#: What git has no part in, where setuptools could find it.
LITTER = (
    'docs/notes.pyc',
    'dynamicvis_geo/models/_scan.abi3.so',
    'tests/__pycache__/test_grid.pyc',
    'tests/lightning_logs/version_0/hparams.yaml',
)

#: Links and pictures in every form that Markdown has for them.
LINKS = """
<a href="docs/pictures.md"><img src="docs/index.png"></a> ![](docs/a.png) [there][one]

[one]: docs/concepts.md#chips

```python
rows[0](docs)
```
"""


def copy_sources(to: Path) -> None:
    """Copy what git has; without git, as in an unpacked sdist, what it would have."""
    if (ROOT / '.git').exists():
        files = ['git', 'ls-files', '-z']
        listed = subprocess.run(files, cwd=ROOT, capture_output=True, check=True)
        for name in filter(None, listed.stdout.decode().split('\0')):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    else:
        ignored = (ROOT / '.gitignore').read_text('utf-8').split()
        patterns = (line.strip('/') for line in ignored)
        made = shutil.ignore_patterns('PKG-INFO', 'setup.cfg', *patterns)
        shutil.copytree(ROOT, to, ignore=made)


class Built:
    """A copy of the sources, and what was built of it."""

    def __init__(self, folder: Path) -> None:
        self.sources = folder / 'sources'
        copy_sources(self.sources)
        with (self.sources / 'README.md').open('a', encoding='utf-8') as file:
            file.write(LINKS)
        self.names = {
            path.relative_to(self.sources).as_posix()
            for path in self.sources.rglob('*')
            if path.is_file()
        }
        for name in LITTER:
            (self.sources / name).parent.mkdir(parents=True, exist_ok=True)
            (self.sources / name).touch()
        installed = f'{sys.prefix}/.installed'
        subprocess.run(
            ['make', '-C', self.sources, 'dist', f'VENV={sys.prefix}', '-o', installed],
            check=True,
        )
        self.dist = self.sources / 'dist'
        (self.sdist,) = self.dist.glob('*.tar.gz')
        (self.pure,) = self.dist.glob('*-py3-none-any.whl')
        (self.platform,) = self.dist.glob('*-py3-none-manylinux*.whl')
        assert len(list(self.dist.iterdir())) == 3


@pytest.fixture(scope='module')
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    compiler = str(sysconfig.get_config_var('CC')).partition(' ')[0]
    if sys.platform != 'linux' or None in map(shutil.which, (compiler, 'make')):
        pytest.skip('it is built on Linux, with make and a C compiler')
    return Built(tmp_path_factory.mktemp('dist'))


def test_source_distribution_is_the_repository(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {
            member.name.partition('/')[2]
            for member in archive.getmembers()
            if member.isfile()
        }
    made = {name for name in names if name.startswith('dynamicvis_geo.egg-info/')}
    assert names - made == built.names | {'PKG-INFO', 'setup.cfg'}


def test_wheels_have_the_package_and_its_data(built: Built) -> None:
    package = {
        name for name in built.names if re.match(r'dynamicvis_geo/.*(?<!\.c)$', name)
    }
    assert {'dynamicvis_geo/py.typed', 'dynamicvis_geo/report/page.html'} <= package
    for wheel, more in (built.pure, set()), (built.platform, {'_scan.so'}):
        with zipfile.ZipFile(wheel) as archive:
            names = {name for name in archive.namelist() if not name.endswith('/')}
        information = {name for name in names if '.dist-info/' in name}
        library = {f'dynamicvis_geo/models/{name}' for name in more}
        assert names - information == package | library
        assert any(name.endswith('/licenses/LICENSE') for name in information)


def test_description_has_links_that_work_anywhere(built: Built) -> None:
    with zipfile.ZipFile(built.pure) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith('.dist-info/METADATA'))
        _, _, description = archive.read(name).decode().partition('\n\n')
    page = markdown.render(description) or ''
    targets = re.findall(r'(?:href|src|srcset)="([^"]*)"', page)
    assert all(re.match('https?://|#', target) for target in targets), targets
    repository = re.escape(PROJECT['urls']['Repository'])
    own = [re.match(f'{repository}/(?:blob|raw)/HEAD/([^#]*)', t) for t in targets]
    paths = {found[1] for found in own if found is not None}
    added = {'docs/index.png', 'docs/a.png'}
    assert added | {'docs/pictures.md', 'docs/concepts.md'} <= paths
    assert all((ROOT / path).exists() for path in paths - added), paths
    assert f'{PROJECT["urls"]["Repository"]}/raw/HEAD/docs/a.png' in targets
    assert 'rows[0](docs)' in description


@pytest.mark.parametrize('kernel', ['c', 'torch'])
def test_wheel_installs_into_an_empty_environment(
    kernel: str, built: Built, tmp_path: Path
) -> None:
    environment = tmp_path / 'environment'
    venv.create(environment, with_pip=False)
    python = environment / 'bin' / 'python'
    variables = {**os.environ, 'PATH': str(tmp_path), 'PYTHONPATH': ''}

    def said(*command: str | Path) -> str:
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=variables,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout

    # Of both wheels, pip takes that for the platform.
    what = 'dynamicvis-geo' if kernel == 'c' else built.pure
    pip = [sys.executable, '-m', 'pip', '--python', python, 'install', '--no-deps']
    said(*pip, '--no-index', '--find-links', built.dist, what)
    (site,) = environment.glob('lib/python*/site-packages')
    ours = [path for path in sys.path if Path(path).name.endswith('-packages')]
    (site / 'dependencies.pth').write_text('\n'.join(ours))
    version = f'dynamicvis-geo {PROJECT["version"]}\n'
    program = environment / 'bin' / 'dynamicvis-geo'
    assert said(program, '--version') == version
    assert said(python, '-m', 'dynamicvis_geo', '--version') == version
    code = 'import dynamicvis_geo; print(dynamicvis_geo.__file__)'
    assert Path(said(python, '-c', code)).is_relative_to(environment)
    information = said(program, 'info', '--device', 'cpu')
    assert re.search(rf'^selective scan +{kernel} ', information, re.MULTILINE)


def test_version_and_address_are_the_same_everywhere() -> None:
    assert dynamicvis_geo.__version__ == PROJECT['version']
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text('utf-8'))
    assert citation['version'] == PROJECT['version']
    repository = PROJECT['urls']['Repository']
    assert citation['repository-code'] == repository
    forms = (ROOT / '.github' / 'ISSUE_TEMPLATE' / 'config.yml').read_text('utf-8')
    (link,) = yaml.safe_load(forms)['contact_links']
    assert link['url'].startswith(repository)
    assert all(url.startswith(repository) for url in PROJECT['urls'].values())
