import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.models.upstream_repo import NATIVE, git, write_packages, write_repository

from .conftest import MakeScene


# In a process of its own: what the official code imports stays imported.
@pytest.mark.parametrize(('shift', 'expected'), [('0.0', 0), ('0.01', 1)])
def test_exit_code_says_whether_the_implementations_agree(
    make_scene: MakeScene, tmp_path: Path, shift: str, expected: int
) -> None:
    repository = tmp_path / 'repository'
    commit = write_repository(repository, NATIVE.replace('{shift}', shift))
    git(repository, 'checkout', '--quiet', commit)
    packages = write_packages(tmp_path / 'packages')
    done = subprocess.run(
        [
            *(sys.executable, '-m', 'dynamicvis_geo.cli', 'verify', make_scene()),
            *('--weights', 'random', '--device', 'cpu'),
        ],
        env=os.environ
        | {
            'PYTHONPATH': f'{packages}{os.pathsep}{Path(__file__).parents[2]}',
            'RS_EMBED_DYNAMICVIS_REPO_PATH': str(repository),
            'RS_EMBED_DYNAMICVIS_IMG': '64',
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == expected, done.stderr
    assert 'stage 3' in done.stdout
    assert f'commit: {commit} (NOT the pinned one' in done.stdout
    for line in ('files: as committed', 'arch: b', 'weights: random', 'precision: 32'):
        assert line in done.stdout
    assert ('DISAGREE' in done.stdout) == bool(expected)


def test_image_of_one_band_is_refused(
    make_scene: MakeScene, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, err = run_cli('verify', make_scene(shape=(1, 64, 64)))
    assert code == 2
    assert '1 bands' in err
