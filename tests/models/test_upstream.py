import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dynamicvis_geo.errors import UpstreamError
from dynamicvis_geo.models.config import BackboneConfig
from dynamicvis_geo.models.repository import clone_repository, repository_commit
from dynamicvis_geo.models.upstream import (
    build_upstream,
    load_upstream_class,
    upstream_source,
)
from tests.models.upstream_repo import (
    TINY,
    commit_all,
    git,
    write_packages,
    write_repository,
)
from tests.processes import HANG

PACKAGES = ('einops', 'mmcv', 'mmengine', 'transformers')
STAND_INS = ('dynamicvis', 'mmdet', 'mmpretrain', 'mmseg', 'opencd')


def modules_of(*packages: str) -> dict[str, Any]:
    return {n: m for n, m in sys.modules.items() if n.partition('.')[0] in packages}


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The packages of the extra, small, in place of those that may be installed."""
    folder = write_packages(tmp_path / 'packages')
    monkeypatch.syspath_prepend(str(folder))
    names = (*PACKAGES, *STAND_INS)
    before = modules_of(*names)
    for name in before:
        del sys.modules[name]
    yield folder
    for name in modules_of(*names):
        del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture
def origin(tmp_path: Path) -> tuple[str, str]:
    """URL and commit of the stand-in for the official repository."""
    folder = tmp_path / 'origin'
    commit = write_repository(folder)
    return str(folder), commit


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The stand-in's files, not a clone."""
    write_repository(tmp_path / 'origin')
    git(tmp_path / 'origin', 'checkout', '--quiet', 'HEAD~')
    return tmp_path / 'origin'


def test_cloned_class_works_and_the_environment_is_left_as_found(
    packages: Path, origin: tuple[str, str], tmp_path: Path
) -> None:
    url, commit = origin
    finders, paths = list(sys.meta_path), list(sys.path)
    cls = load_upstream_class(None, url, commit, tmp_path / 'cache')
    assert (cls.__module__, cls.__name__) == (
        'dynamicvis.models.models',
        'DynamicVisBackbone',
    )
    assert modules_of(*STAND_INS) == {}
    assert (sys.meta_path, sys.path) == (finders, paths)
    assert upstream_source(cls).commit == commit

    model: Any = cls(img_size=16, layer_cfgs={'use_mambapy': False})
    x = torch.randn(2, 3, 16, 16)
    tokens = model.conv(x).flatten(2).mT
    expected = F.layer_norm(tokens, (8,), eps=1e-6).mT.unflatten(-1, (4, 4))
    torch.testing.assert_close(model(x)[0], expected)
    assert load_upstream_class(None, url, commit, tmp_path / 'cache') is cls


def test_no_init_file_of_the_repository_is_run(packages: Path, folder: Path) -> None:
    for init in folder.glob('dynamicvis/**/__init__.py'):
        init.write_text("raise RuntimeError('this file is not to be run')")
    file = folder / 'dynamicvis' / 'models' / 'models.py'
    other = folder / 'dynamicvis' / 'datasets' / 'statistics.py'
    other.write_text('MEAN = 123.675')
    file.write_text(
        'from dynamicvis.datasets.statistics import MEAN\n'
        'from ..datasets import statistics\n' + file.read_text()
    )
    # A folder of the module's name would come before it, if left to Python.
    (folder / 'dynamicvis' / 'models' / 'models').mkdir()
    cls: Any = load_upstream_class(folder)
    assert cls.forward.__globals__['MEAN'] == 123.675
    assert upstream_source(cls).file == file


def test_source_says_whether_files_were_edited(packages: Path, folder: Path) -> None:
    cls = load_upstream_class(folder)
    assert upstream_source(cls).edited is False
    assert not upstream_source(cls).is_pinned
    (folder / 'notes.txt').write_text('not a file of the commit')
    assert upstream_source(cls).edited is False
    file = folder / 'dynamicvis' / 'models' / 'models.py'
    file.write_text(file.read_text() + '# A comment')
    assert upstream_source(cls).edited is True
    git(folder, 'add', '--all')
    assert upstream_source(cls).edited is True
    shutil.rmtree(folder / '.git')
    source = upstream_source(cls)
    assert (source.commit, source.edited) == (None, None)


def test_without_git_nobody_can_tell_edited_files(
    packages: Path,
    origin: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url, commit = origin
    cls = load_upstream_class(None, url, commit, tmp_path / 'cache')
    monkeypatch.setenv('PATH', str(tmp_path))
    source = upstream_source(cls)
    assert (source.commit, source.edited) == (commit, None)


def test_failing_import_leaves_the_environment_as_found(
    packages: Path, folder: Path
) -> None:
    (folder / 'dynamicvis' / 'models' / 'models.py').write_text(
        'import sys, mmdet.models, mmseg.registry\n'
        "sys.path.insert(0, '/nowhere')\nraise RuntimeError('broken on purpose')"
    )
    finders, paths = list(sys.meta_path), list(sys.path)
    with pytest.raises(UpstreamError, match='RuntimeError: broken on purpose'):
        load_upstream_class(folder)
    assert modules_of(*STAND_INS) == {}
    assert (sys.meta_path, sys.path) == (finders, paths)


def test_modules_loaded_before_are_put_back(
    packages: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / 'other' / 'dynamicvis'
    other.mkdir(parents=True)
    (other / '__init__.py').write_text("NAME = 'of somebody else'")
    monkeypatch.syspath_prepend(str(other.parent))
    import dynamicvis  # type: ignore[import-not-found]

    load_upstream_class(folder)
    assert sys.modules['dynamicvis'] is dynamicvis
    assert 'dynamicvis.models' not in sys.modules


def test_installed_packages_are_stood_in_for_and_stay(
    packages: Path, folder: Path
) -> None:
    (packages / 'mmdet').mkdir()
    (packages / 'mmdet' / '__init__.py').write_text('VERSION = 3')
    import mmdet  # type: ignore[import-not-found]

    assert load_upstream_class(folder)(img_size=16, layer_cfgs={'use_mambapy': False})
    assert sys.modules['mmdet'] is mmdet
    assert list(modules_of(*STAND_INS)) == ['mmdet']


def test_stand_in_parts_refuse_to_be_used(packages: Path, folder: Path) -> None:
    cls: Any = load_upstream_class(folder)
    head = cls.forward.__globals__['DynamicVisClsHead']
    with pytest.raises(
        UpstreamError, match=r'mmpretrain\.models\.ClsHead .*only the backbone'
    ):
        head(num_classes=3)


def test_installed_official_code_is_found(
    packages: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As with PYTHONPATH=repository: its own, failing mmdet is importable as well.
    monkeypatch.syspath_prepend(str(folder))
    cls = load_upstream_class(repo_cache=tmp_path / 'cache', auto_download=False)
    assert upstream_source(cls).file == folder / 'dynamicvis/models/models.py'
    assert not (tmp_path / 'cache').exists()


def test_repo_path_comes_before_installed_code(
    packages: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(folder))
    mine = tmp_path / 'mine'
    shutil.copytree(folder, mine)
    cls = load_upstream_class(mine)
    assert upstream_source(cls).file == mine / 'dynamicvis/models/models.py'


def test_wrong_repo_path(tmp_path: Path) -> None:
    with pytest.raises(UpstreamError, match=r'repo_path=.*no file dynamicvis/models'):
        load_upstream_class(tmp_path)


def test_no_code_and_no_leave_to_clone(origin: tuple[str, str], tmp_path: Path) -> None:
    url, commit = origin
    with pytest.raises(UpstreamError, match=r'auto_download_repo=False .* repo_path'):
        load_upstream_class(None, url, commit, tmp_path / 'cache', auto_download=False)
    assert not (tmp_path / 'cache').exists()


def test_clone_is_used_without_leave_to_clone(
    packages: Path, origin: tuple[str, str], tmp_path: Path
) -> None:
    url, commit = origin
    clone_repository(url, commit, tmp_path / 'cache')
    shutil.rmtree(url)
    assert load_upstream_class(
        None, url, commit, tmp_path / 'cache', auto_download=False
    )


def test_missing_packages_give_the_command(
    packages: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, 'mmengine', None)
    with pytest.raises(
        UpstreamError,
        match=r'mmengine is not installed.*pip install "dynamicvis-geo\[upstream\]"',
    ):
        load_upstream_class(folder)


def test_package_that_fails_says_why(packages: Path, folder: Path) -> None:
    (packages / 'mmcv' / '__init__.py').write_text('import pkg_resources_of_old')
    with pytest.raises(UpstreamError, match=r'mmcv \(No module .*pkg_resources_of_old'):
        load_upstream_class(folder)


def test_another_transformers_says_what_to_do(packages: Path, folder: Path) -> None:
    write_packages(packages, transformers='5.23.0')
    with pytest.raises(UpstreamError, match=r'4\.50\.0, not 5\.23\.0.*pip install'):
        load_upstream_class(folder)


def test_repository_of_something_else(
    packages: Path, origin: tuple[str, str], tmp_path: Path
) -> None:
    url, _ = origin
    git(Path(url), 'rm', '-rq', 'dynamicvis')
    commit_all(Path(url))
    commit = git(Path(url), 'rev-parse', 'HEAD')
    with pytest.raises(UpstreamError, match='not the official code'):
        load_upstream_class(None, url, commit, tmp_path / 'cache')


def test_build_gives_what_the_constructor_needs(
    packages: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = BackboneConfig(repo_path=folder, img_size=16, sampling_scale=0.2)
    model: Any = build_upstream(config, 'l', {'layer_cfgs': {'state_size': 8}})
    assert model.settings == {
        'sampling_scale': {'type': 'fixed', 'val': 0.2},
        'layer_cfgs': {'state_size': 8, 'use_mambapy': False},
        'out_indices': (3,),
        'out_type': 'featmap',
    }
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model(torch.zeros(1, 3, 16, 16))[0].shape == (1, 16, 4, 4)
    assert capsys.readouterr().out == ''


def test_constructor_that_refuses(packages: Path, folder: Path) -> None:
    file = folder / 'dynamicvis' / 'models' / 'models.py'
    file.write_text(file.read_text().replace('sampling_scale=', 'noise='))
    with pytest.raises(UpstreamError, match=r"refuses .*TypeError.*'sampling_scale'"):
        build_upstream(BackboneConfig(repo_path=folder, img_size=16), 'b')


def test_position_embedding_is_resized_on_loading(packages: Path, folder: Path) -> None:
    config = BackboneConfig(repo_path=folder, img_size=16)
    small, large = (
        build_upstream(replace(config, img_size=size), 'b') for size in (16, 32)
    )
    state = {k: torch.randn_like(v) for k, v in small.state_dict().items()}
    large.load_state_dict(state)
    grid = state['pos_embed'].mT.unflatten(-1, (4, 4))
    expected = F.interpolate(grid, (8, 8), mode='bicubic').flatten(2).mT
    torch.testing.assert_close(large.state_dict()['pos_embed'], expected)

    wide = build_upstream(replace(config, img_size=(16, 32)), 'b')
    with pytest.raises(UpstreamError, match='32 tokens, which are not the 5 x 5 grid'):
        small.load_state_dict(wide.state_dict())


def test_clone_is_at_its_commit_and_made_once(
    origin: tuple[str, str], tmp_path: Path
) -> None:
    url, commit = origin
    cache = tmp_path / 'deep' / 'cache'
    root = clone_repository(url, commit, cache)
    assert repository_commit(root) == commit
    assert TINY in (root / 'dynamicvis' / 'models' / 'models.py').read_text()
    shutil.rmtree(url)
    assert clone_repository(url, commit, cache) == root


def test_two_commits_live_side_by_side(origin: tuple[str, str], tmp_path: Path) -> None:
    url, commit = origin
    newer = git(Path(url), 'rev-parse', 'HEAD')
    roots = [clone_repository(url, c, tmp_path / 'cache') for c in (commit, newer)]
    assert [repository_commit(root) for root in roots] == [commit, newer]


@pytest.fixture
def git_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that gets a line for each call of git."""
    log = tmp_path / 'git.log'
    program = tmp_path / 'bin' / 'git'
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {log}\nexec {shutil.which("git")} "$@"'
    )
    program.chmod(0o755)
    monkeypatch.setenv('PATH', f'{program.parent}{os.pathsep}{os.environ["PATH"]}')
    return log


def clone_together(barrier: Any, results: Any, *arguments: Any) -> None:
    barrier.wait()
    results.put(clone_repository(*arguments))


def test_parallel_ranks_clone_once(
    origin: tuple[str, str], tmp_path: Path, git_log: Path
) -> None:
    url, commit = origin
    context = multiprocessing.get_context('fork')
    barrier, results = context.Barrier(4), context.Queue()
    arguments = (barrier, results, url, commit, tmp_path / 'cache')
    ranks = [
        context.Process(target=clone_together, args=arguments, daemon=True)
        for _ in range(4)
    ]
    for rank in ranks:
        rank.start()
    roots = {results.get(timeout=HANG) for _ in ranks}
    for rank in ranks:
        rank.join(HANG)
    assert [rank.exitcode for rank in ranks] == [0] * 4
    assert len(roots) == 1
    assert sum(' clone ' in line for line in git_log.read_text().splitlines()) == 1


def test_what_a_killed_process_left_is_cleared(
    origin: tuple[str, str], tmp_path: Path
) -> None:
    url, commit = origin
    partial = tmp_path / 'cache' / f'.DynamicVis-{commit[:12]}.partial'
    (partial / '.git').mkdir(parents=True)
    (partial / '.git' / 'HEAD').write_text('half')
    assert (
        repository_commit(clone_repository(url, commit, tmp_path / 'cache')) == commit
    )
    assert not partial.exists()


def test_failed_clone_leaves_nothing_that_counts(
    origin: tuple[str, str], tmp_path: Path
) -> None:
    url, commit = origin
    with pytest.raises(UpstreamError, match=r'cannot clone repo_url=.*missing'):
        clone_repository(f'{url}-missing', commit, tmp_path / 'cache')
    assert clone_repository(url, commit, tmp_path / 'cache').is_dir()


def test_unreachable_server(tmp_path: Path) -> None:
    with pytest.raises(UpstreamError, match=r'127\.0\.0\.1:1.*network.*repo_path'):
        clone_repository('http://127.0.0.1:1/x.git', 'a' * 40, tmp_path)


def test_commit_that_the_repository_lacks(
    origin: tuple[str, str], tmp_path: Path
) -> None:
    url, _ = origin
    with pytest.raises(UpstreamError, match=f'repo_commit={"b" * 40} of repo_url'):
        clone_repository(url, 'b' * 40, tmp_path)
    assert not (tmp_path / f'DynamicVis-{"b" * 12}').exists()


@pytest.mark.parametrize('commit', ['main', 'abc1234', '--help', ''])
def test_commit_must_be_a_full_hash(commit: str, tmp_path: Path) -> None:
    with pytest.raises(UpstreamError, match=r'repo_commit=.*40 hexadecimal digits'):
        clone_repository('somewhere', commit, tmp_path)


def test_clone_at_another_commit_is_refused(
    origin: tuple[str, str], tmp_path: Path
) -> None:
    url, commit = origin
    root = clone_repository(url, commit, tmp_path / 'cache')
    git(root, 'checkout', '--quiet', 'origin/HEAD')
    other = git(root, 'rev-parse', 'HEAD')
    with pytest.raises(UpstreamError, match=f'{commit}.* holds {other}: delete'):
        clone_repository(url, commit, tmp_path / 'cache')
    shutil.rmtree(root / '.git')
    with pytest.raises(UpstreamError, match='holds no git repository'):
        clone_repository(url, commit, tmp_path / 'cache')


def test_machine_without_git(
    origin: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, commit = origin
    root = clone_repository(url, commit, tmp_path / 'cache')
    monkeypatch.setenv('PATH', str(tmp_path))
    assert clone_repository(url, commit, tmp_path / 'cache') == root
    with pytest.raises(UpstreamError, match=r'git is not installed.*repo_path'):
        clone_repository(url, commit, tmp_path / 'empty')


def test_git_variables_of_a_hook_do_no_harm(
    origin: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, commit = origin
    monkeypatch.setenv('GIT_DIR', str(tmp_path / 'elsewhere'))
    monkeypatch.setenv('GIT_INDEX_FILE', str(tmp_path / 'index'))
    assert (
        repository_commit(clone_repository(url, commit, tmp_path / 'cache')) == commit
    )


def test_cache_that_cannot_be_written(origin: tuple[str, str], tmp_path: Path) -> None:
    url, commit = origin
    (tmp_path / 'file').write_text('')
    with pytest.raises(UpstreamError, match=r'repo_cache=.*file.*choose another'):
        clone_repository(url, commit, tmp_path / 'file' / 'cache')
