"""Commands that need no model, and errors of those that do, import no model."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands.conftest import MakeScene
from tests.outputs import write_grid, write_pooled

#: What takes seconds to import.
HEAVY = ('torch', 'torchvision', 'torchgeo', 'lightning', 'sklearn')

#: Runs each line of standard input without them, and prints how each ends.
RUN = f"""
import sys
sys.modules |= dict.fromkeys({HEAVY})
from dynamicvis_geo import cli
for line in sys.stdin:
    try:
        print(cli.main(line.split()), line, end='')
    except SystemExit as ended:
        print(ended.code, line, end='')
"""

#: Commands that end well.
DONE = """
cache info .
plot rgb scene.tif --output rgb.png
plot pca maps --output pca.png
plot map pooled.parquet --method pca --output map.png
plot map pooled.parquet --color valid_fraction --output column.png
plot neighbours pooled.parquet --chip 0 --output neighbours.png
similar pooled.parquet --like 0 --k 2 --output found.csv --sheet found.png
report pooled.parquet --output report.html
change pooled.parquet other.parquet --output change.parquet
card pooled.parquet --output card.md
merge pooled.parquet
"""

#: Commands that end with an error.
REFUSED = """
embed nothing.tif --output new.parquet
embed pooled.parquet --output new.parquet
embed scene.tif --bands 1,2,9 --output new.parquet
embed scene.tif --output new.txt
embed scene.tif --output another.parquet
embed scene.tif --output maps
embed scene.tif --grid --pooling max --output new
embed scene.tif --grid --dtype int8 --output new
embed scene.tif --year 2022 --output new.parquet
embed scene.tif --shard 4/3 --output new.parquet
embed scene.tif --weights nothing.pth --output new.parquet
embed scene.tif --weights scene.tif --output new.parquet
embed scene.tif --img-size 8 --output new.parquet
embed scene.tif --device tpu --output new.parquet
embed scene.tif --points nothing.csv --output new.parquet
embed scene.tif --colour red --output new.parquet
embed --points scene.tif --output new.parquet
embed --points nothing.csv --year 2022 --output new.parquet
embed --roi 10,47,11,48 --output new.parquet
embed --roi 10,47,11,48 --start 2022-06-01 --output new.parquet
embed --roi 10,47,11,48 --start 2022-06-31 --end 2022-09-01 --output new.parquet
embed --roi nothing.geojson --year 2022 --output new.parquet
fetch --roi 10,47,11,48 --year 2022
fetch --roi 10,47,11,48 --start 2022-09-01 --end 2022-06-01 --cache chips
plot map maps --output new.png
similar pooled.parquet --like nothing
probe nothing.parquet --target kind
probe pooled.parquet --target kind --labels nothing.csv
predict-map nothing.ckpt maps --output classes
report nothing.parquet --output new.html
merge nothing.parquet
predict --config nothing.yaml
convert nothing.pth new.safetensors
info --checkpoint nothing.pth
"""


@pytest.mark.parametrize(('commands', 'code'), [(DONE, 0), (REFUSED, 2)])
def test_commands_that_need_no_model_import_none(
    commands: str, code: int, make_scene: MakeScene, tmp_path: Path
) -> None:
    make_scene()
    write_pooled(tmp_path / 'pooled.parquet')
    write_pooled(tmp_path / 'other.parquet')
    write_grid(tmp_path / 'maps')
    (tmp_path / 'another.parquet').write_text('not of ours')
    done = subprocess.run(
        [sys.executable, '-c', RUN],
        input=commands.strip(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ended = [line for line in done.stdout.splitlines() if line[:2].strip().isdigit()]
    wanted = [f'{code} {line}' for line in commands.strip().splitlines()]
    assert [line for line in ended if line in wanted] == wanted, done.stderr
