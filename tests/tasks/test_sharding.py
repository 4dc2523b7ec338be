"""Real runs of two processes, which share their chips or refuse to."""

import json
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
)

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.samplers import ContiguousSampler
from dynamicvis_geo.tasks import FeatureExtraction


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class Images(Dataset[dict[str, Tensor]]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {'image': torch.zeros(3, 8, 8), 'chip': torch.tensor([index])}


class Stream(IterableDataset[dict[str, Tensor]]):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (Images(4)[i] for i in range(4))


class Batches(Sampler[list[int]]):
    """Like the batch samplers of TorchGeo 0.8."""

    def __init__(self) -> None:
        pass

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[0, 1], [2, 3]])


def distributed(count: int, rank: int) -> DataLoader[Any]:
    sampler: DistributedSampler[Any] = DistributedSampler(
        Images(count), num_replicas=2, rank=rank
    )
    return DataLoader(Images(count), sampler=sampler)


def seeded() -> RandomSampler:
    return RandomSampler(Images(5), generator=torch.Generator().manual_seed(3))


Make = Callable[[int], Any]
ORDINARY: Make = lambda rank: DataLoader(Images(5), batch_size=2)  # noqa: E731
FEW: Make = lambda rank: DataLoader(Images(5), sampler=ContiguousSampler([3]))  # noqa: E731
#: How a dataloader is made, options of the Trainer, and the chips that both processes
#: do together, or what the refusal names.
CASES: dict[str, tuple[Make, dict[str, Any], list[int] | str]] = {
    'ordinary': (ORDINARY, {}, [0, 1, 2, 3, 4]),
    'undivided': (ORDINARY, {'use_distributed_sampler': False}, 'SequentialSampler'),
    'shuffled': (lambda rank: DataLoader(Images(5), shuffle=True), {}, 'shuffle=True'),
    'seeded': (
        lambda rank: DataLoader(Images(5), sampler=seeded()),
        {},
        [0, 1, 2, 3, 4],
    ),
    'batch sampler': (
        lambda rank: DataLoader(Images(5), batch_sampler=Batches()),
        {},
        'Batches',
    ),
    'stream': (lambda rank: DataLoader(Stream()), {}, 'Stream'),
    'no loader': (lambda rank: [[Images(1)[0]]], {}, 'list is no DataLoader'),
    'padded': (lambda rank: distributed(5, rank), {}, '6 of 5 chips'),
    'even': (lambda rank: distributed(4, rank), {}, [0, 1, 2, 3]),
    'contiguous': (
        lambda rank: DataLoader(Images(9), sampler=ContiguousSampler([8, 1, 6])),
        {'use_distributed_sampler': False},
        [1, 6, 8],
    ),
    'more processes than chips': (FEW, {}, [3]),
}


def predicted(loader: Any, **options: Any) -> list[int] | str:
    trainer = Trainer(
        accelerator='cpu',
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )
    try:
        batches = trainer.predict(FeatureExtraction(Mean()), loader) or []
    except SpecError as error:
        return str(error)
    return [int(chip) for batch in batches for chip in batch['chip']]


def run_as_rank(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    # What torchrun sets for the processes that it starts.
    os.environ.update(
        LOCAL_RANK=str(rank), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port)
    )
    seen: dict[str, Any] = {}
    for name, (make, options, _) in CASES.items():
        try:
            seen[name] = predicted(make(rank), devices=2, strategy='ddp', **options)
        except Exception:
            seen[name] = traceback.format_exc()
    (folder / f'{rank}.json').write_text(json.dumps(seen))


@pytest.fixture(scope='module')
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the two processes did or said, case by case."""
    if sys.platform == 'win32':
        pytest.skip('gloo')
    folder = tmp_path_factory.mktemp('ranks')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    start_processes(run_as_rank, (port, folder), nprocs=2, start_method='fork')
    return [json.loads((folder / f'{rank}.json').read_text()) for rank in range(2)]


@pytest.mark.parametrize('name', CASES)
def test_each_chip_once_or_a_refusal(name: str, seen: list[dict[str, Any]]) -> None:
    expected = CASES[name][2]
    one, two = (rank[name] for rank in seen)
    if isinstance(expected, list):
        assert isinstance(one, list), one
        assert isinstance(two, list), two
        assert sorted(one + two) == expected
        assert abs(len(one) - len(two)) <= 1
    else:
        for said in (one, two):
            assert expected in said
            assert 'ContiguousSampler' in said


@pytest.mark.parametrize('name', ['batch sampler', 'stream', 'shuffled', 'undivided'])
def test_one_process_takes_anything(name: str) -> None:
    make, options, _ = CASES[name]
    assert len(predicted(make(0), devices=1, **options)) in (4, 5)
