from typing import Any

import numpy as np
import pytest
from torch.utils.data import DistributedSampler

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.samplers import ContiguousSampler


@pytest.mark.parametrize('count', [0, 1, 3, 8, 17])
@pytest.mark.parametrize('processes', [1, 2, 3, 8])
def test_every_row_once_in_runs_of_equal_length(count: int, processes: int) -> None:
    rows = np.arange(count) * 3 + 5
    shares = [
        ContiguousSampler(rows, num_replicas=processes, rank=rank)
        for rank in range(processes)
    ]
    assert [row for share in shares for row in share] == rows.tolist()
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1
    assert lengths == sorted(lengths, reverse=True)


def test_alone_it_gives_everything() -> None:
    sampler = ContiguousSampler([4, 2, 9])
    assert isinstance(sampler, DistributedSampler)
    assert list(sampler) == [4, 2, 9]
    assert (sampler.num_replicas, sampler.rank, sampler.total_size) == (1, 0, 3)
    assert all(type(row) is int for row in sampler)


@pytest.mark.parametrize(
    ('arguments', 'names'),
    [
        ({'rank': 0}, 'both, or neither'),
        ({'num_replicas': 2}, 'both, or neither'),
        ({'num_replicas': 2, 'rank': 2}, 'rank=2'),
        ({'num_replicas': 0, 'rank': 0}, 'rank=0'),
    ],
)
def test_no_such_process(arguments: dict[str, Any], names: str) -> None:
    with pytest.raises(SpecError, match=names):
        ContiguousSampler([1, 2], **arguments)
