"""Images fetched into a cache ahead of their use, with a bar and a report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass
from itertools import islice

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from dynamicvis_geo.datasets.source import GeoSlice
from dynamicvis_geo.earthengine.web import Client

#: Queries that are planned at a time.
SLAB = 20_000


@dataclass(frozen=True)
class FetchReport:
    """The work that :meth:`RemoteDataset.prefetch` did.

    Attributes:
        chips: Number of chips asked for.
        fetched: How many were fetched; the others were in the cache.
        without_imagery: How many of the fetched ones have no valid pixel.
        requests: Requests sent.
        retries: How many of them were repetitions.
        bytes: Bytes received.
        seconds: Time taken.
    """

    chips: int
    fetched: int
    without_imagery: int
    requests: int
    retries: int
    bytes: int
    seconds: float


def fetch_ahead(
    queries: Iterable[GeoSlice],
    fetch: Callable[[Sequence[GeoSlice]], Iterable[bool | None]],
    client: Client,
    progress: bool,
) -> FetchReport:
    """Fetch any number of chips, some thousands at a time.

    Args:
        queries: The chips.
        fetch: Fetches chips into the cache, and gives for each of them, in any order,
            None if it is there already, else if it has a valid pixel.
        client: Client that *fetch* uses, whose counters are reported.
        progress: Whether to draw a progress bar.
    """
    started, before = time.monotonic(), client.traffic.counts
    total = fetched = empty = 0
    count = len(queries) if isinstance(queries, Sized) else None
    remaining = iter(queries)
    with (
        logging_redirect_tqdm(),
        tqdm(total=count, unit='chip', disable=not progress) as bar,
    ):
        while slab := list(islice(remaining, SLAB)):
            for valid in fetch(slab):
                total += 1
                if valid is not None:
                    fetched += 1
                    empty += not valid
                    counts = client.traffic.counts
                    bar.set_postfix(
                        MB=f'{(counts.received - before.received) / 1e6:.1f}',
                        retries=counts.retries - before.retries,
                        refresh=False,
                    )
                bar.update()
    counts = client.traffic.counts
    return FetchReport(
        chips=total,
        fetched=fetched,
        without_imagery=empty,
        requests=counts.requests - before.requests,
        retries=counts.retries - before.retries,
        bytes=counts.received - before.received,
        seconds=time.monotonic() - started,
    )
