import pytest

from dynamicvis_geo.callbacks.shards import Shard
from dynamicvis_geo.errors import SpecError


@pytest.mark.parametrize(
    ('text', 'environ', 'expected'),
    [
        ('1/1', {}, Shard(0, 1)),
        ('3/10', {}, Shard(2, 10)),
        ('3/10', {'JOB_COMPLETION_INDEX': '7'}, Shard(2, 10)),
        ('/10', {'JOB_COMPLETION_INDEX': '7'}, Shard(7, 10)),
        ('/4', {'AWS_BATCH_JOB_ARRAY_INDEX': '0'}, Shard(0, 4)),
    ],
)
def test_shard_on_the_command_line(
    text: str, environ: dict[str, str], expected: Shard
) -> None:
    shard = Shard.parse(text, environ)
    assert shard == expected
    assert Shard.parse(str(shard)) == shard


@pytest.mark.parametrize(
    ('text', 'environ'),
    [
        ('0/10', {}),
        ('11/10', {}),
        ('1/0', {}),
        ('3', {}),
        ('-1/3', {}),
        ('a/b', {}),
        ('/10', {}),
        ('/10', {'JOB_COMPLETION_INDEX': '10'}),
        ('/10', {'JOB_COMPLETION_INDEX': 'x'}),
    ],
)
def test_what_is_no_shard(text: str, environ: dict[str, str]) -> None:
    with pytest.raises(SpecError, match='shard='):
        Shard.parse(text, environ)


def slurm(task: int, least: int, most: int, count: int) -> dict[str, str]:
    numbers = {'ID': task, 'MIN': least, 'MAX': most, 'COUNT': count}
    return {f'SLURM_ARRAY_TASK_{name}': str(value) for name, value in numbers.items()}


@pytest.mark.parametrize(
    ('environ', 'expected'),
    [
        ({}, None),
        ({'SLURM_JOB_ID': '5', 'RANK': '1'}, None),
        (slurm(1, 1, 10, 10), Shard(0, 10)),
        (slurm(10, 1, 10, 10), Shard(9, 10)),
        (slurm(0, 0, 9, 10), Shard(0, 10)),
        (slurm(8, 0, 12, 4), Shard(2, 4)),
        (slurm(5, 5, 5, 1), Shard(0, 1)),
        ({'BATCH_TASK_INDEX': '2', 'BATCH_TASK_COUNT': '5'}, Shard(2, 5)),
    ],
)
def test_shard_of_an_array_job(environ: dict[str, str], expected: Shard | None) -> None:
    assert Shard.from_environment(environ) == expected


@pytest.mark.parametrize(
    'tasks', [[1, 2, 5], [1, 3, 4, 9], [0, 1, 2, 3, 5], [2, 3, 4, 9]]
)
def test_arrays_with_gaps_are_refused_somewhere(tasks: list[int]) -> None:
    def shard(task: int) -> Shard | None:
        return Shard.from_environment(slurm(task, tasks[0], tasks[-1], len(tasks)))

    with pytest.raises(SpecError, match='gaps'):
        [shard(task) for task in tasks]


@pytest.mark.parametrize(
    'environ',
    [
        {'AWS_BATCH_JOB_ARRAY_INDEX': '3'},
        {'JOB_COMPLETION_INDEX': '3'},
        {'BATCH_TASK_INDEX': '3'},
        {'SLURM_ARRAY_TASK_ID': '3'},
        {'BATCH_TASK_INDEX': '5', 'BATCH_TASK_COUNT': '5'},
    ],
)
def test_array_jobs_that_do_not_say_enough(environ: dict[str, str]) -> None:
    with pytest.raises(SpecError, match='shard='):
        Shard.from_environment(environ)
