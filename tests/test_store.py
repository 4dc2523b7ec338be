import threading
from pathlib import Path

import pytest

from dynamicvis_geo.errors import OutputError
from dynamicvis_geo.store import Store


def test_store_lists_reads_and_puts(store: Store) -> None:
    assert store.names() == []
    assert store.read('one') is None
    store.put('one', b'first')
    store.put('one', memoryview(b'second'))
    assert store.put_new('two', b'2')
    assert not store.put_new('two', b'3')
    assert store.read('one') == b'second'
    assert store.read('two') == b'2'
    assert sorted(store.names()) == ['one', 'two']


def test_one_of_many_begins(store: Store) -> None:
    ready, won = threading.Barrier(8), []

    def put(number: int) -> None:
        ready.wait()
        if store.put_new('run.json', str(number).encode() * 10_000):
            won.append(number)

    threads = [threading.Thread(target=put, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.read('run.json') == str(won[0]).encode() * 10_000
    assert store.names() == ['run.json']


def test_what_a_store_refuses_names_the_place(tmp_path: Path) -> None:
    (tmp_path / 'file').write_text('')
    for store in (Store(f'{tmp_path}/file'), Store(f'file://{tmp_path}/file')):
        with pytest.raises(OutputError, match=r"cannot write '.*file/one'"):
            store.put('one', b'')
        with pytest.raises(OutputError, match=r"cannot list '.*file'"):
            store.names()
    with pytest.raises(OutputError, match="cannot use 'nosuch://place'"):
        Store('nosuch://place').names()
    (tmp_path / 'folder' / 'one').mkdir(parents=True)
    with pytest.raises(OutputError, match=r"cannot write '.*folder/one'"):
        Store(f'{tmp_path}/folder').put('one', b'')
    assert [path.name for path in (tmp_path / 'folder').iterdir()] == ['one']


def test_a_file_written_here_is_put_whole(store: Store) -> None:
    with store.whole('one') as path:
        path.write_bytes(b'first')
        assert 'one' not in store.names()

    def fail() -> None:
        with store.whole('one') as path:
            path.write_bytes(b'half of the sec')
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert store.read('one') == b'first'
    assert store.names() == ['one']
    with store.open('one') as file:
        file.seek(2)
        assert file.read() == b'rst'
    store.remove('one')
    store.remove('one')
    assert store.names() == []
    with pytest.raises(OutputError, match=r'cannot read .*one'), store.open('one'):
        pass
