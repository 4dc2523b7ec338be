from collections.abc import Callable
from pathlib import Path

import pytest

from tests.models.checkpoints import make_checkpoint

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
    assert table['path_type'] == ['forward_reverse_mean', 'default']
    assert table['device'][0].startswith('cpu')
    assert table['selective scan'][0].endswith('(asked for: auto)')
    assert table['torch'][0] != table['selective scan'][0]


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


def test_file_that_is_no_checkpoint_is_one_line(
    run_cli: RunCli, tmp_path: Path
) -> None:
    page = tmp_path / 'weights.pth'
    page.write_text('<!DOCTYPE html><html>Sign in</html>')
    code, out, err = run_cli('info', '--checkpoint', page)
    assert (code, out) == (2, '')
    assert err.count('\n') == 1
    assert str(page) in err
