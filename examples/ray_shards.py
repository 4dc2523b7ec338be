"""Embed on a Ray cluster, shard by shard: what dies is done again elsewhere.

    python examples/ray_shards.py --shards 100 --gpus 1 -- --roi region.geojson \
        --year 2022 --on-error skip --output s3://bucket/region.parquet

The arguments after -- are those of dynamicvis-geo embed. Needs pip install '.[ray]' on
all machines, which see the output. Started again, it goes on from where it was.
"""

import argparse
import sys

import ray

from dynamicvis_geo.cli import main

#: Exit code of a run that SIGTERM has ended, as when a machine is taken away.
TERMINATED = 143

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument('--shards', type=int, required=True, help='several a machine')
parser.add_argument('--cpus', type=float, default=1, help='of each shard')
parser.add_argument('--gpus', type=float, default=0, help='of each shard')
parser.add_argument('embed', nargs='+', metavar='ARGUMENT', help='of embed')
given = parser.parse_args()


@ray.remote(max_retries=-1)
def embed(shard: str) -> int:
    """Run a shard in a process of Ray's; return its exit code."""
    code = main(['embed', *given.embed, '--shard', shard])
    if code == TERMINATED:
        sys.exit(code)  # Ray takes that for a process that has died.
    return code


# Says what it will be, and what is wrong, before the cluster is asked.
if code := main(['embed', *given.embed, '--dry-run']):
    sys.exit(code)
shard = embed.options(num_cpus=given.cpus, num_gpus=given.gpus)
codes = [shard.remote(f'{i + 1}/{given.shards}') for i in range(given.shards)]
sys.exit(max(ray.get(codes)))
