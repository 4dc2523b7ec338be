import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.documents.blocks import ROOT

RunCli = Callable[..., tuple[int, str, str]]

#: What bash does on the Tab key, without a terminal.
TAB = """
eval "$(dynamicvis-geo completion bash)"
complete -p dynamicvis-geo > /dev/null
COMP_LINE=$1 COMP_POINT=${#1} COMP_TYPE=9
read -ra COMP_WORDS <<< "$1"
_python_argcomplete dynamicvis-geo
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.skipif(shutil.which('bash') is None, reason='there is no bash')
@pytest.mark.parametrize(
    ('line', 'found', 'absent'),
    [
        ('dynamicvis-geo pre', {'predict', 'predict-map'}, 'probe'),
        ('dynamicvis-geo embed --on-', {'--on-error', '--on-missing'}, '--output'),
        ('dynamicvis-geo embed --on-error ', {'skip', 'raise'}, 'scene.tif'),
        ('dynamicvis-geo embed ', {'scene.tif', 'scenes/'}, '--output'),
        ('dynamicvis-geo embed scene.tif --output scenes/', {'scenes/b.tif'}, ''),
        ('dynamicvis-geo plot pca --', {'--output'}, '--on-error'),
        ('dynamicvis-geo predict --config ', {'scene.tif'}, 'embed'),
    ],
)
def test_bash_completes(
    line: str, found: set[str], absent: str, tmp_path: Path
) -> None:
    (tmp_path / 'scene.tif').touch()
    (tmp_path / 'scenes').mkdir()
    (tmp_path / 'scenes' / 'b.tif').touch()
    program = tmp_path / 'bin' / 'dynamicvis-geo'
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dynamicvis_geo "$@"\n')
    program.chmod(0o755)
    done = subprocess.run(
        ['bash', '-euo', 'pipefail', '-c', TAB, 'bash', line],
        cwd=tmp_path,
        env={
            **os.environ,
            'PATH': f'{program.parent}:{os.environ["PATH"]}',
            'PYTHONPATH': str(ROOT),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    words = {word.strip() for word in done.stdout.splitlines()}
    assert found <= words, done
    assert absent not in words


@pytest.mark.parametrize('shell', ['zsh', 'fish'])
def test_shell_can_read_what_is_printed(shell: str, run_cli: RunCli) -> None:
    code, printed, _ = run_cli('completion', shell)
    assert code == 0
    assert 'dynamicvis-geo' in printed
    if shutil.which(shell) is not None:
        subprocess.run([shell, '-n'], input=printed, text=True, check=True)
