"""A format of one's own: a module like this, and a line of FORMATS."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from dynamicvis_geo.callbacks import EmbeddingWriter
from dynamicvis_geo.false_colour import plot_false_colours
from dynamicvis_geo.formats import FORMATS
from dynamicvis_geo.formats.base import Format, OpenRun, Predictions
from dynamicvis_geo.formats.block_files import Blocks
from dynamicvis_geo.formats.parquet_files import Extent, GeoParquetWriter
from dynamicvis_geo.formats.tables import row_keys
from dynamicvis_geo.outputs import open_output
from dynamicvis_geo.paths import Place
from dynamicvis_geo.provenance import to_json
from dynamicvis_geo.report import write_report
from tests.callbacks.standins import Chips
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
        assert len(row_keys(rows)) == len(rows)
        with (
            self._folder.whole('chips.parquet', blocks.store) as path,
            GeoParquetWriter(
                path, rows.schema, Extent.of(rows), blocks.provenance
            ) as file,
        ):
            file.write(rows.combine_chunks())
        self._folder.put('metadata.json', to_json(blocks.provenance).encode())

    @classmethod
    def is_at(cls, path: Place, is_folder: bool) -> bool:
        return is_folder and any(path.glob('*.npy'))

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
