import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.models.upstream_repo import NATIVE, git, write_packages, write_repository

from .conftest import MakeScene

RunCli = Callable[..., tuple[int, str, str]]


def instead(packages: Path) -> None:
    """Put packages before those of their names that are installed, or imported."""
    names = {entry.stem for entry in packages.iterdir()}
    for name in [name for name in sys.modules if name.partition('.')[0] in names]:
        del sys.modules[name]
    sys.path.insert(0, str(packages))


# In a process of its own: what the official code imports stays imported.
@pytest.mark.parametrize(('shift', 'expected'), [('0.0', 0), ('0.01', 1)])
def test_exit_code_says_whether_the_implementations_agree(
    make_scene: MakeScene,
    run_apart: RunCli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shift: str,
    expected: int,
) -> None:
    repository = tmp_path / 'repository'
    commit = write_repository(repository, NATIVE.replace('{shift}', shift))
    git(repository, 'checkout', '--quiet', commit)
    packages = write_packages(tmp_path / 'packages')
    monkeypatch.setenv('RS_EMBED_DYNAMICVIS_REPO_PATH', str(repository))
    code, out, err = run_apart(
        *('verify', make_scene(), '--weights', 'random', '--device', 'cpu'),
        prepare=partial(instead, packages),
    )
    assert code == expected, err
    assert 'stage 3' in out
    assert f'commit: {commit} (NOT the pinned one' in out
    for line in ('files: as committed', 'arch: b', 'weights: random', 'precision: 32'):
        assert line in out
    assert ('DISAGREE' in out) == bool(expected)


def test_image_of_one_band_is_refused(make_scene: MakeScene, run_cli: RunCli) -> None:
    code, _, err = run_cli('verify', make_scene(shape=(1, 64, 64)))
    assert code == 2
    assert '1 bands' in err
