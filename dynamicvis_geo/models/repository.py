"""A git repository at one commit: cloned once, whole or not at all."""

import os
import re
import shutil
import subprocess
from pathlib import Path

from filelock import FileLock

from dynamicvis_geo.errors import UpstreamError

#: Within a git hook these would point git at another repository.
_HOOK_VARIABLES = ('GIT_DIR', 'GIT_INDEX_FILE', 'GIT_WORK_TREE')
#: A server that stalls for a minute is given up; a shared clone may be another user's.
_GIT_OPTIONS = ('http.lowSpeedLimit=1000', 'http.lowSpeedTime=60', 'safe.directory=*')


def clone_repository(url: str, commit: str, cache: Path) -> Path:
    """Clone *url* at *commit* into a folder of *cache*, unless it is there already.

    Parallel processes clone once; the folder appears complete or not at all.

    Args:
        url: anything that git clones.
        commit: full hash.
        cache: folder of the clones; created if need be.

    Returns:
        The clone.

    Raises:
        UpstreamError: if git is missing or fails, the repository lacks the commit, or
            the folder holds another one.
    """
    root = clone_folder(cache, commit)
    try:
        if not root.exists():
            root.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f'{root}.lock'):
                if not root.exists():
                    partial = root.with_name(f'.{root.name}.partial')
                    # Left by a process that was killed: the lock is ours now.
                    shutil.rmtree(partial, ignore_errors=True)
                    _clone(url, commit, partial)
                    partial.rename(root)
    except OSError as error:
        raise UpstreamError(
            f'cannot write a clone to repo_cache={cache} ({error}): choose another '
            'repo_cache, or set repo_path to a folder with the repository'
        ) from error
    return checked_clone(root, commit)


def repository_commit(root: Path) -> str | None:
    """Read the commit that is checked out in a folder.

    Args:
        root: the folder.

    Returns:
        The full hash; None if the folder is no repository.
    """
    head = root / '.git' / 'HEAD'
    text = head.read_text().strip() if head.is_file() else ''
    if _is_hash(text):
        # As in our own clones, also on machines that have no git.
        return text
    return _ask_git(root, 'rev-parse', 'HEAD')


def is_edited(root: Path) -> bool | None:
    """Look for changed files of the commit that is checked out in a folder.

    Args:
        root: the folder.

    Returns:
        True if there are any; None if it is no repository, or there is no git.
    """
    changed = _ask_git(root, 'status', '--porcelain', '--untracked-files=no')
    return None if changed is None else bool(changed)


def _ask_git(root: Path, *question: str) -> str | None:
    """Ask git about a repository that may be somebody else's; None without answer."""
    if not (root / '.git').exists() or shutil.which('git') is None:
        return None
    result = _git('--no-optional-locks', '-C', str(root), *question)
    return result.stdout.strip() if result.returncode == 0 else None


def clone_folder(cache: Path, commit: str) -> Path:
    """Name the folder of the clone at a commit.

    Args:
        cache: folder of the clones.
        commit: full hash.

    Returns:
        The folder, be it there or not.

    Raises:
        UpstreamError: if *commit* is not a full hash.
    """
    if not _is_hash(commit):
        raise UpstreamError(
            f'repo_commit={commit!r} must be the 40 hexadecimal digits of a commit: a '
            'branch or a tag may move'
        )
    return cache.expanduser() / f'DynamicVis-{commit[:12]}'


def checked_clone(root: Path, commit: str) -> Path:
    """Return a folder if a commit is checked out there.

    Args:
        root: the folder.
        commit: full hash.

    Returns:
        The folder.

    Raises:
        UpstreamError: if it is not.
    """
    found = repository_commit(root)
    if found != commit:
        raise UpstreamError(
            f'{root} should hold commit {commit} of the official code, but holds '
            f'{found or "no git repository"}: delete the folder, and it is cloned again'
        )
    return root


def _is_hash(text: str) -> bool:
    return re.fullmatch('[0-9a-f]{40}', text) is not None


def _clone(url: str, commit: str, target: Path) -> None:
    # Files of other commits are left out where the server can do that.
    options = ['--quiet', '--no-checkout', '--filter=blob:none']
    result = _git('clone', *options, '--', url, str(target))
    if result.returncode:
        raise UpstreamError(
            f'git cannot clone repo_url={url} ({_reason(result)}): check the URL and '
            'the network, or copy a clone here from elsewhere and set repo_path'
        )
    result = _git('-C', str(target), 'checkout', '--quiet', '--detach', commit)
    if result.returncode:
        raise UpstreamError(
            f'git cannot check out repo_commit={commit} of repo_url={url} '
            f'({_reason(result)}): give a commit that the repository has'
        )


def _git(*arguments: str) -> 'subprocess.CompletedProcess[str]':
    environment = {k: v for k, v in os.environ.items() if k not in _HOOK_VARIABLES}
    environment |= {'GIT_TERMINAL_PROMPT': '0', 'LC_ALL': 'C'}
    options = [part for option in _GIT_OPTIONS for part in ('-c', option)]
    try:
        return subprocess.run(
            ['git', *options, *arguments],
            capture_output=True,
            text=True,
            env=environment,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except FileNotFoundError as error:
        raise UpstreamError(
            'the official code must be cloned, but git is not installed: install git, '
            'or copy a clone here from elsewhere and set repo_path'
        ) from error


def _reason(result: 'subprocess.CompletedProcess[str]') -> str:
    lines = result.stderr.strip().splitlines()
    return lines[-1] if lines else f'exit status {result.returncode}'
