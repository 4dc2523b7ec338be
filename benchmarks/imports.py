"""Processor time of commands that need no model, and the heavy libraries they import.

Run it from the root of the repository: ``python -m benchmarks.imports``.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

#: Libraries that take a second or more, or hundreds of megabytes.
HEAVY = ('torch', 'lightning', 'torchgeo', 'torchvision', 'sklearn', 'scipy', 'pandas')

#: Commands, in a folder in which ``dynamicvis-geo demo`` was done.
COMMANDS = (
    '--help',
    'embed --help',
    'cache info demo-output',
    'plot rgb demo-output/scene.tif --output rgb.png',
    'plot pca demo-output/feature-maps --output pca.png',
    'plot map demo-output/embeddings.parquet --method pca --output map.png',
    'plot neighbours demo-output/embeddings.parquet --chip 0 --output near.png',
    'similar demo-output/embeddings.parquet --like 0 --k 3',
    'similar demo-output/feature-maps --like 13.5,48.7 --k 3 --sheet sheet.png',
    'report demo-output/embeddings.parquet --output report.html',
    'card demo-output/embeddings.parquet',
    'merge demo-output/embeddings.parquet',
    'info',
    # Errors.
    'embed nothing.tif --output a.parquet',
    'embed demo-output/scene.tif --output a.txt',
    'embed demo-output/scene.tif --grid --pooling max --output a',
    'embed demo-output/scene.tif --year 2022 --output a.parquet',
    'embed --points demo-output/scene.tif --output a.parquet',
    'embed --roi 10,47,11,48 --start 2022-06-31 --end 2022-09-01 --output a.parquet',
    'embed --roi 10,47,11,48 --start 2022-06-01 --output a.parquet',
    'embed --roi nowhere.geojson --year 2022 --output a.parquet',
    'embed demo-output/scene.tif --shard 4/3 --output a.parquet',
    'embed demo-output/scene.tif --weights nothing.pth --output a.parquet',
    'embed demo-output/scene.tif --colour red --output a.parquet',
    'embed demo-output/scene.tif --device tpu --output a.parquet',
    'fetch --roi 10,47,11,48 --start 2022-09-01 --end 2022-06-01 --cache chips',
    'plot map demo-output/scene.tif --output map.pdf',
    'plot rgb demo-output/scene.tif --output rgb.gif',
    'similar demo-output/embeddings.parquet --like nowhere',
    'probe demo-output/embeddings.parquet --target cover --labels nothing.csv',
    'predict-map nothing.ckpt demo-output/feature-maps --output classes',
    'report nothing.parquet --output another.html',
    'merge nothing.parquet',
    'convert nothing.pth out.safetensors',
    'predict --config nothing.yaml',
)

_RUN = f"""
import os, sys
from dynamicvis_geo import cli
try:
    code = cli.main(sys.argv[2:])
except SystemExit as ended:
    code = ended.code
found = [name for name in {HEAVY} if name in sys.modules]
with open(sys.argv[1], 'w') as file:
    print(code, *found, file=file)
"""


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--repeat', type=int, default=3, help='the least is shown')
    parser.add_argument('--only', default='', help='commands that have this in them')
    options = parser.parse_args()
    os.environ['PYTHONPATH'] = str(Path(__file__).parents[1])
    os.environ['RS_EMBED_DYNAMICVIS_IMG'] = '64'
    with tempfile.TemporaryDirectory() as folder:
        demo = Path(folder, 'demo-output')
        make = [sys.executable, '-m', 'dynamicvis_geo', 'demo', '--output', str(demo)]
        subprocess.run(make, check=True, capture_output=True)
        print('| command | exit | CPU s | of these it imports |')
        print('|---|---|---|---|')
        for command in COMMANDS:
            if options.only in command:
                runs = [measure(demo, command.split()) for _ in range(options.repeat)]
                seconds = min(time for time, _ in runs)
                code, _, found = runs[-1][1].partition(' ')
                print(f'| `{command}` | {code} | {seconds:.2f} | {found} |', flush=True)


def measure(demo: Path, arguments: list[str]) -> tuple[float, str]:
    """Run a command in a process; return its seconds, exit code and heavy imports."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, demo.name).symlink_to(demo)
        told = Path(folder, 'told')
        process = subprocess.Popen(
            [sys.executable, '-c', _RUN, str(told), *arguments],
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _, _, used = os.wait4(process.pid, 0)
        return used.ru_utime + used.ru_stime, told.read_text().strip()


if __name__ == '__main__':
    main()
