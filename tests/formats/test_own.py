"""A format of one's own: a module like this, and a line of FORMATS."""

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from dynamicvis_geo.callbacks import EmbeddingWriter
from dynamicvis_geo.errors import OutputError
from dynamicvis_geo.false_colour import plot_false_colours
from dynamicvis_geo.formats import FORMATS
from dynamicvis_geo.formats.base import Format, OpenRun, Predictions
from dynamicvis_geo.formats.block_files import Blocks
from dynamicvis_geo.formats.parquet_files import Extent, GeoParquetWriter
from dynamicvis_geo.formats.tables import row_keys
from dynamicvis_geo.outputs import open_output
from dynamicvis_geo.paths import Place
from dynamicvis_geo.provenance import describe_embeddings, to_json
from dynamicvis_geo.report import write_report
from tests.callbacks.standins import Chips, Task
from tests.callbacks.test_resume import Failing, fail
from tests.callbacks.test_writer import predict


class NPY(Format):
    """Feature maps as one NumPy file a chip, and a table of the chips."""

    output: ClassVar[Literal['pooled', 'grid']] = 'grid'
    dtypes: ClassVar[tuple[str, ...]] = ('float32',)
    suffixes: ClassVar[tuple[str, ...]] = ('.npys',)
    members: ClassVar[tuple[str, ...]] = ('*.npy', 'chips.parquet', 'metadata.json')

    def held(self) -> pa.StringArray:
        names = [name for name in self._folder.names() if name.endswith('.npy')]
        return pa.array([name.removesuffix('.npy') for name in names], pa.string())

    def write_maps(
        self, run: OpenRun, number: int, predictions: Sequence[Predictions]
    ) -> None:
        for some in predictions:
            names = run.chips.rows(some.chip)['chip_id']
            for name, features in zip(names, some.embedding, strict=True):
                file = io.BytesIO()
                np.save(file, features)
                self._folder.put(f'{name}.npy', file.getbuffer())

    def merge(self, blocks: Blocks) -> None:
        rows = pa.concat_tables(blocks.rows())
        before = self._folder.read('chips.parquet')
        if before is not None:
            held = pq.read_table(pa.BufferReader(before)).cast(rows.schema)
            others = pc.invert(pc.is_in(row_keys(held), blocks.keys()))
            rows = pa.concat_tables([held.filter(others), rows])
        with (
            self._folder.whole('chips.parquet', blocks.store) as path,
            GeoParquetWriter(
                path, rows.schema, Extent.of(rows), blocks.provenance
            ) as file,
        ):
            file.write(rows.combine_chunks())
        described = describe_embeddings('pixel', 5)
        made = to_json({**blocks.provenance, **described})
        self._folder.put('metadata.json', made.encode())

    @classmethod
    def is_at(cls, path: Place, is_folder: bool) -> bool:
        return is_folder and any(path.glob('*.npy'))

    @classmethod
    def wrote(cls, path: Place) -> bool:
        return path.name.startswith('chip-') or super().wrote(path)

    @classmethod
    def read_chips(cls, path: Place, most: int) -> tuple[pd.DataFrame, int, int]:
        chips = gpd.read_parquet(path / 'chips.parquet')
        first = next(cls.read_maps(path, chips))
        return chips, len(chips), len(first)

    @classmethod
    def read_maps(
        cls, path: Place, chips: pd.DataFrame
    ) -> Iterator[NDArray[np.float32]]:
        for name in chips['id']:
            yield np.load(path / f'{name}.npy')


def test_it_is_written_continued_and_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FORMATS, 'npy', NPY)
    path, chips = tmp_path / 'maps.npys', Chips(6)
    fail(EmbeddingWriter(path, block_chips=2), Chips(6), Failing('grid', fail_at=2))
    predict(EmbeddingWriter(path), chips, Failing('grid'))
    assert 0 < len(chips.asked) < 6
    opened = open_output(path)
    assert (opened.kind, opened.total, opened.dimensions) == ('grid', 4, 5)
    maps = opened.maps(opened.chips)
    assert [f'chip-{one[0, 0, 0]:.0f}' for one in maps] == opened.chips['id'].tolist()
    failures = opened.failures()
    assert failures is not None
    assert failures.table['id'].tolist() == ['chip-0', 'chip-3']
    assert plot_false_colours(opened).axes
    assert 'maps.npys' in write_report(path, tmp_path / 'page.html').read_text()

    predict(EmbeddingWriter(path), Chips(8), Failing('grid'))
    assert (open_output(path).total, len(open_output(path).chips)) == (5, 5)
    predict(EmbeddingWriter(path, overwrite=True), Chips(2), Failing('grid'))
    assert open_output(path).chips['id'].tolist() == ['chip-1']


PLACE = ['id', 'crs', 'minx', 'miny', 'maxx', 'maxy', 'width', 'height']


class CSV(Format):
    """Pooled embeddings in one file of text, whose first line is the provenance."""

    output: ClassVar[Literal['pooled', 'grid']] = 'pooled'
    dtypes: ClassVar[tuple[str, ...]] = ('float32',)
    suffixes: ClassVar[tuple[str, ...]] = ('.csv',)
    members: ClassVar[tuple[str, ...]] = ()
    is_folder = False

    def held(self) -> pa.StringArray:
        return pa.array(self._table()['id'], pa.string())

    def _table(self) -> pd.DataFrame:
        content = self._location.parent.read(self._location.name)
        if content is None:
            return pd.DataFrame({'id': []})
        return pd.read_csv(io.BytesIO(content), comment='#')

    def merge(self, blocks: Blocks) -> None:
        old = self._table()
        rows = pa.concat_tables(blocks.rows()).to_pandas()
        values = pd.DataFrame(np.stack(rows['embedding']))
        new = pd.concat([rows[PLACE], values.add_prefix('f')], axis=1)
        old = old[~old['id'].isin(blocks.keys().to_pylist())]
        made = {**blocks.provenance, **describe_embeddings('chip', values.shape[1])}
        text = pd.concat([old, new]).to_csv(index=False)
        self._location.parent.put(
            self._location.name, f'#{to_json(made)}\n{text}'.encode()
        )

    @classmethod
    def is_at(cls, path: Place, is_folder: bool) -> bool:
        return not is_folder and path.name.endswith('.csv')

    @classmethod
    def read_chips(cls, path: Place, most: int) -> tuple[pd.DataFrame, int, int]:
        rows = pd.read_csv(path, comment='#')
        return rows[PLACE], len(rows), rows.shape[1] - len(PLACE)

    @classmethod
    def read_provenance(cls, path: Place) -> dict[str, Any]:
        first, _, _ = path.read_text().partition('\n')
        return dict(json.loads(first[1:])) if first.startswith('#{') else {}


def test_one_file_is_continued_and_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FORMATS, 'csv', CSV)
    path = tmp_path / 'out.csv'
    for count in (4, 4, 6):
        predict(EmbeddingWriter(path), Chips(count), Task('pooled'))
        assert open_output(path).total == count
    predict(EmbeddingWriter(path, overwrite=True), Chips(3), Task('pooled'))
    assert open_output(path).total == 3
    path.write_text('id,f0\nmine,1\n')
    with pytest.raises(OutputError, match='carries no provenance'):
        predict(EmbeddingWriter(path), Chips(3), Task('pooled'))
