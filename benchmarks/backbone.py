"""Forward time and peak memory of the backbone on the CPU, and how far the limit is.

Each form runs in a process of its own, because peak memory belongs to a process:

- sequential: the scan as the paper writes it down: discretised [2B, I, L, 16] tensors
  for the whole sequence, then a Python loop over time;
- torch: our plain PyTorch scan, which runs where there was no compiler;
- auto: our default, which is the scan in C where it was built;
- bf16: the same under bfloat16 autocast, as Lightning's precision 'bf16-mixed' runs it.

The floor is what the model's matrix products and convolutions alone would take at the
float32 rate of one large product, which is measured in turn with the form. 'products'
are these products run again as they are, in the form's own precision.

Times are the fastest of several calls, since other work on the machine only ever adds.
On a busy machine --threads 1 --clock cpu measures best: time of the processor, not of
the wall.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dynamicvis_geo.models import DynamicVis, scan
from dynamicvis_geo.models.scan import resolve_scan

FORMS = ('sequential', 'torch', 'auto', 'bf16')
MATRIX_OPS = {'aten::linear', 'aten::mm', 'aten::addmm', 'aten::conv2d'}
MATRIX_OPS |= {'aten::convolution'}
ROW = '{:>5}  {:<10}  {:>8}  {:>12}  {:>7}  {:>9}  {:>12}'
RATE_SIZE = 2048
CLOCKS = {'wall': time.perf_counter, 'cpu': time.process_time}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--arch', default='b', choices=['b', 'l'])
    parser.add_argument('--img-size', type=int, default=512)
    parser.add_argument('--batch-size', type=int, nargs='+', default=[1, 4])
    parser.add_argument('--forms', nargs='+', default=FORMS, choices=FORMS)
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument('--repeats', type=int, default=3, help='rounds that are timed')
    parser.add_argument('--clock', default='wall', choices=CLOCKS)
    parser.add_argument('--one', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args, args.forms[0], args.batch_size[0])))
        return
    print(
        f'arch {args.arch}, {args.img_size} px, {args.threads} threads, '
        f'torch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()}), '
        f'auto is {resolve_scan("auto", "cpu")!r}, {args.clock} time'
    )
    print(
        ROW.format(
            *('batch', 'form', 's/image', 'speed-up of', 'x floor', 'share of'),
            'peak memory',
        )
    )
    print(ROW.format('', '', '', 'sequential', '', 'products', 'of forward'))
    for batch_size in args.batch_size:
        results = {form: in_process(form, batch_size) for form in args.forms}
        for form, result in results.items():
            print_row(batch_size, form, result, results)
        rates = ', '.join(f'{result["rate"]:.0f}' for result in results.values())
        gflop = next(iter(results.values()))['gflop']
        print(f'       {gflop:.1f} GFLOP an image; GFLOP/s of a product: {rates}')


def print_row(
    batch_size: int, form: str, result: dict[str, float], results: dict[str, Any]
) -> None:
    seconds = result['seconds']
    sequential = results.get('sequential', {}).get('seconds')
    print(
        ROW.format(
            batch_size,
            form,
            f'{seconds / batch_size:.3f}',
            f'{sequential / seconds:.1f}' if sequential else '-',
            f'{seconds / result["floor"]:.2f}',
            f'{result["products"] / seconds:.0%}',
            f'{result["megabytes"]:.0f} MB',
        ),
        flush=True,
    )


def in_process(form: str, batch_size: int) -> dict[str, float]:
    command = [sys.executable, *sys.argv, '--one']
    command += ['--forms', form, '--batch-size', str(batch_size)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    values: dict[str, float] = json.loads(result.stdout)
    return values


@torch.inference_mode()
def measure(args: argparse.Namespace, form: str, batch_size: int) -> dict[str, float]:
    """Time a form, its products and a large product in turn.

    The memory is what the first call adds to the peak of the process.
    """
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if form == 'sequential':
        setattr(scan, 'selective_scan', sequential_scan)  # noqa: B010
    model = DynamicVis(
        args.arch,
        img_size=args.img_size,
        out_indices=(0, 1, 2, 3),
        scan='auto' if form in ('auto', 'bf16') else 'torch',
    ).eval()
    image = torch.randn(batch_size, 3, args.img_size, args.img_size)

    def call() -> None:
        with torch.autocast('cpu', torch.bfloat16, enabled=form == 'bf16'):
            model(image)

    before = peak_megabytes()
    call()
    megabytes = peak_megabytes() - before
    products = products_of(call)
    with FlopCounterMode(display=False) as counter:
        products()
    gflop = counter.get_total_flops() / 1e9
    left, right = torch.randn(2, RATE_SIZE, RATE_SIZE)
    clock = CLOCKS[args.clock]
    rounds = [
        [seconds_of(work, clock) for work in (call, products, lambda: left @ right)]
        for _ in range(args.repeats)
    ]
    forward, again, product = (min(times) for times in zip(*rounds, strict=True))
    rate = 2 * RATE_SIZE**3 / 1e9 / product
    return {
        'seconds': forward,
        'products': again,
        'floor': gflop / rate,
        'rate': rate,
        'gflop': gflop / batch_size,
        'megabytes': megabytes,
    }


def seconds_of(work: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    work()
    return clock() - start


def peak_megabytes() -> float:
    """Peak resident memory of this process; Linux counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == 'darwin' else 1024)


def sequential_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    gate: Tensor,
) -> Tensor:
    """Scan as :func:`dynamicvis_geo.models.scan.selective_scan` does, step by step."""
    directions = u.shape[0]

    def turn(x: Tensor) -> Tensor:
        return torch.cat([x[0], x[1].flip(1)]) if directions == 2 else x[0]

    u, dt, B, C = (turn(x) for x in (u, dt, B, C))
    gate = turn(gate.expand(directions, *gate.shape))
    h, dt = u.transpose(1, 2), F.softplus(dt + dt_bias).transpose(1, 2)
    decay = torch.exp(A[:, None] * dt[..., None])
    drive = dt[..., None] * B[:, None] * h[..., None]
    state = torch.zeros_like(decay[:, :, 0])
    outputs = []
    for t in range(u.shape[1]):
        state = decay[:, :, t] * state + drive[:, :, t]
        outputs.append(torch.matmul(state, C[:, t, :, None])[..., 0])
    y = torch.stack(outputs, dim=-1) + h * D[:, None]
    y = (y.transpose(1, 2) * F.silu(gate)).unflatten(0, (directions, -1))
    return torch.stack([y[0], y[1].flip(1)]) if directions == 2 else y


class Recorder(TorchDispatchMode):
    """Keep the matrix products and convolutions of a call, to run them again."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func.name().split('.')[0] in MATRIX_OPS:
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def products_of(call: Callable[[], Any]) -> Callable[[], None]:
    """Give a function that does the matrix products and convolutions of a call."""
    with Recorder() as recorder:
        call()

    def replay() -> None:
        for func, args in recorder.calls:
            func(*args)

    return replay


if __name__ == '__main__':
    main()
