import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.models.checkpoints import make_checkpoint
from tests.models.hub import COMMIT, Hub, serve_hub

RunCli = Callable[..., tuple[int, str, str]]


def rows(out: str) -> dict[str, list[str]]:
    """The first word of each line, and the other columns."""
    lines = [[c for c in line.split('  ') if c] for line in out.splitlines() if line]
    return {line[0].strip(): [c.strip() for c in line[1:]] for line in lines}


def test_each_setting_says_where_its_value_comes_from(
    run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('RS_EMBED_DYNAMICVIS_ARCH', 'l')
    code, out, _ = run_cli('info', '--weights', 'some/file.pth', '--device', 'cpu')
    assert code == 0
    table = rows(out)
    assert table['arch'] == ['l', 'RS_EMBED_DYNAMICVIS_ARCH']
    assert table['img_size'] == ['64', 'RS_EMBED_DYNAMICVIS_IMG']
    assert table['checkpoint'] == ['some/file.pth', 'argument']
    _, out, _ = run_cli('info', '--img-size', '32', '--device', 'cpu')
    assert rows(out)['img_size'] == ['32', 'argument']
    assert table['path_type'] == ['forward_reverse_mean', 'default']
    assert table['device'][0].startswith('cpu')
    assert table['selective scan'][0].endswith('(asked for: auto)')
    assert table['torch'][0] != table['selective scan'][0]


@pytest.mark.parametrize(('command', 'unbuffered'), [('--help', ''), ('info', '1')])
def test_a_reader_that_has_gone_ends_it_quietly(command: str, unbuffered: str) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run(
        [sys.executable, '-m', 'dynamicvis_geo', command],
        stdout=theirs,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, 'PYTHONUNBUFFERED': unbuffered},
    )
    os.close(theirs)
    # As the shell sees it of programs that the system ends for this.
    assert (done.stderr, done.returncode) == ('', 141)


def test_wrong_variable_is_one_line(
    run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('RS_EMBED_DYNAMICVIS_IMG', 'big')
    code, out, err = run_cli('info')
    assert (code, out) == (2, '')
    assert err.count('\n') == 1
    assert 'RS_EMBED_DYNAMICVIS_IMG' in err


def test_checkpoint_is_inspected_and_converted(run_cli: RunCli, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / 'dynamicvis_b.pth')
    code, out, _ = run_cli('info', '--checkpoint', source)
    assert code == 0
    table = rows(out)
    assert table['arch'] == ['b']
    assert table['image size'] == ['64 x 64']
    assert table['mixers'] == ['Mamba']
    assert table['backbone keys'] == ['311']
    assert len(table['SHA-256'][0]) == 64

    converted = tmp_path / 'b.safetensors'
    code, out, _ = run_cli('convert', source, converted)
    assert code == 0
    assert str(converted) in out
    _, out, _ = run_cli('info', '--checkpoint', converted)
    again = rows(out)
    assert again['backbone keys'] == ['311']
    assert again['ignored keys'] == ['none']
    code, _, err = run_cli('convert', source, converted)
    assert code == 2
    assert str(converted) in err


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve_hub(monkeypatch, tmp_path / 'hf') as server:
        yield server


def test_repository_is_listed_and_its_checkpoints_inspected(
    run_cli: RunCli, hub: Hub, tmp_path: Path
) -> None:
    content = make_checkpoint(tmp_path / 'x.pth', stages=1).read_bytes()
    for name in ('README.md', 'dynamicvis_b.pth', 'l/epoch_200.pth'):
        hub.files['owner/name', name] = content
    code, out, _ = run_cli('info', '--checkpoint', 'hf://owner/name')
    assert (code, out.split()) == (0, ['dynamicvis_b.pth', 'l/epoch_200.pth'])
    for revision in ('', '@main', f'@{COMMIT}'):
        address = f'hf://owner/name{revision}/l/epoch_200.pth'
        code, out, _ = run_cli('info', '--checkpoint', address)
        assert code == 0
        assert rows(out)['image size'] == ['64 x 64']
    for address, words in (
        ('hf://owner', 'hf://OWNER/NAME'),
        ('hf://owner/other', 'Repository Not Found'),
        ('hf://owner/name@v9', 'Invalid rev id: v9'),
        ('hf://owner/name/x.pth', 'holds dynamicvis_b.pth, l/epoch_200.pth'),
    ):
        code, out, err = run_cli('info', '--checkpoint', address)
        assert (code, out) == (2, '')
        assert words in err


def test_file_that_is_no_checkpoint_is_one_line(
    run_cli: RunCli, tmp_path: Path
) -> None:
    page = tmp_path / 'weights.pth'
    page.write_text('<!DOCTYPE html><html>Sign in</html>')
    code, out, err = run_cli('info', '--checkpoint', page)
    assert (code, out) == (2, '')
    assert err.count('\n') == 1
    assert str(page) in err
