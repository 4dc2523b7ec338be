"""Images a second and peak memory of the backbone on a GPU, and how far the limit is.

One call prints one table: arch b and l at 512 pixels, batches of 1, 8 and 32, float32
and bfloat16 autocast, the Triton form of the scan against the PyTorch form.

The floor is the time that the work itself takes on this GPU: for each matrix product
and convolution its FLOPs at the rate of a large matrix product, or its bytes at the
rate of a large copy, whichever is more; and for each scan its bytes, moved once.
Both rates are measured here, in the precision of the row. All other operations count
nothing, since they could be fused. ``graph`` replays the Triton form as a CUDA graph,
whose memory PyTorch does not count.

Weights and images are random. Times are medians of several calls, after two that are
not counted.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dynamicvis_geo.models import DynamicVis
from dynamicvis_geo.models.scan_forms import resolve_scan

FORMS = ('auto', 'triton', 'graph', 'mamba_ssm', 'torch', 'c')
PRECISIONS = {'float32': torch.float32, 'bf16': torch.bfloat16}
ROW = '{:>4}  {:>5}  {:<8}  {:<9}  {:>9}  {:>9}  {:>9}  {:>8}  {:>8}  {:>9}'
Call = Callable[[], Any]


def main() -> None:
    args = parse_arguments()
    device = torch.device(args.device)
    if device.type == 'cuda' and not torch.cuda.is_available():
        sys.exit(
            'PyTorch finds no CUDA GPU. Run this on a machine with one and a PyTorch '
            'built for CUDA, or add --device cpu --img-size 64 for a dry run'
        )
    print(describe(device))
    torch.backends.cuda.matmul.allow_tf32 = args.tf32
    torch.backends.cudnn.allow_tf32 = args.tf32
    rates = {
        name: measure_rates(device, name, args.rate_size) for name in args.precision
    }
    for name, (flops, bandwidth) in rates.items():
        tf32 = ' (TF32)' if args.tf32 and name == 'float32' else ''
        print(
            f'{name}{tf32}: {flops / 1e12:.2f} TFLOP/s in a matrix product, '
            f'{bandwidth / 1e9:.0f} GB/s in a copy'
        )
    print(
        ROW.format('', '', '', '', 'images', 'ms', 'speed-up', 'floor', 'times', 'peak')
    )
    print(
        ROW.format(
            *('arch', 'batch', 'numbers', 'form', 'a second', 'a call', 'of torch'),
            *('ms', 'floor', 'memory'),
        )
    )
    for arch in args.arch:
        for batch_size in args.batch_size:
            for precision in args.precision:
                print_rows(args, device, arch, batch_size, precision, rates[precision])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--device', default='cuda')
    parser.add_argument('--arch', nargs='+', default=['b', 'l'], choices=['b', 'l'])
    parser.add_argument('--img-size', type=int, default=512)
    parser.add_argument('--batch-size', type=int, nargs='+', default=[1, 8, 32])
    parser.add_argument(
        '--precision', nargs='+', default=list(PRECISIONS), choices=PRECISIONS
    )
    parser.add_argument(
        '--forms',
        nargs='+',
        choices=FORMS,
        help='forms of the scan (default: triton graph torch, on a CPU c torch)',
    )
    parser.add_argument('--repeats', type=int, default=10, help='calls that are timed')
    parser.add_argument(
        '--tf32', action='store_true', help='let float32 matrix products use TF32'
    )
    parser.add_argument(
        '--rate-size', type=int, help='side of the matrices that give the rates'
    )
    args = parser.parse_args()
    on_cuda = args.device.startswith('cuda')
    args.forms = args.forms or (
        ['triton', 'graph', 'torch'] if on_cuda else ['c', 'torch']
    )
    args.rate_size = args.rate_size or (8192 if on_cuda else 512)
    if 'graph' in args.forms and not on_cuda:
        parser.error('--forms graph: CUDA graphs need a CUDA device')
    return args


def describe(device: torch.device) -> str:
    versions = f'Python {platform.python_version()}, torch {torch.__version__}'
    if device.type != 'cuda':
        return f'{device.type}, {torch.get_num_threads()} threads; {versions}'
    properties = torch.cuda.get_device_properties(device)
    try:
        import triton
    except ImportError:
        versions += ', no triton'
    else:
        versions += f', triton {triton.__version__}'
    return (
        f'{properties.name}, {properties.multi_processor_count} multiprocessors, '
        f'{properties.total_memory / 2**30:.0f} GiB; {versions}, '
        f'CUDA {torch.version.cuda}'
    )


def print_rows(
    args: argparse.Namespace,
    device: torch.device,
    arch: str,
    batch_size: int,
    precision: str,
    rates: tuple[float, float],
) -> None:
    results: dict[str, tuple[float, float]] = {}
    floor = None
    call: Call | None = None
    for form in args.forms:
        try:
            call = prepare(args, device, arch, batch_size, precision, form)
            # The matrix products are the same in all forms; the fused ones show the
            # scan as one operation, whose bytes can be told.
            if floor is None and form not in ('torch', 'graph'):
                floor = floor_seconds(call, *rates)
            results[form] = measure(call, device, args.repeats)
        except torch.cuda.OutOfMemoryError:
            print(ROW.format(arch, batch_size, precision, form, *['no memory'] * 6))
        finally:
            call = None
            if device.type == 'cuda':
                torch.cuda.empty_cache()
    torch_seconds = results.get('torch', (None,))[0]
    for form, (seconds, gigabytes) in results.items():
        print(
            ROW.format(
                *(arch, batch_size, precision, form),
                f'{batch_size / seconds:.1f}',
                f'{seconds * 1e3:.2f}',
                f'{torch_seconds / seconds:.2f}' if torch_seconds else '-',
                f'{floor * 1e3:.2f}' if floor else '-',
                f'{seconds / floor:.2f}' if floor else '-',
                f'{gigabytes:.2f} GB' if gigabytes and form != 'graph' else '-',
            ),
            flush=True,
        )


@torch.inference_mode()
def prepare(
    args: argparse.Namespace,
    device: torch.device,
    arch: str,
    batch_size: int,
    precision: str,
    form: str,
) -> Call:
    torch.manual_seed(0)
    scan = 'triton' if form == 'graph' else form
    resolve_scan(scan, device.type)
    model: nn.Module = DynamicVis(arch, img_size=args.img_size, scan=scan)
    model = model.eval().to(device)
    image = torch.randn(batch_size, 3, args.img_size, args.img_size, device=device)

    @torch.inference_mode()
    def forward() -> Any:
        # Autocast keeps copies of the weights while it lasts, which a graph must not.
        with torch.autocast(
            device.type,
            torch.bfloat16,
            enabled=precision == 'bf16',
            cache_enabled=form != 'graph',
        ):
            return model(image)

    return capture(forward) if form == 'graph' else forward


def capture(forward: Call) -> Call:
    """Record the kernels of a call, to replay them without Python."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            forward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = forward()

    def replay() -> Any:
        graph.replay()
        return outputs

    return replay


def measure(call: Call, device: torch.device, repeats: int) -> tuple[float, float]:
    """Give the median seconds of a call and the peak of memory in gigabytes."""
    for _ in range(2):
        call()
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        if device.type == 'cuda':
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated(device) if device.type == 'cuda' else 0
    return statistics.median(seconds), peak / 1e9


@torch.inference_mode()
def measure_rates(
    device: torch.device, precision: str, side: int
) -> tuple[float, float]:
    """Measure FLOPs a second of a matrix product, and bytes a second of a copy."""
    dtype = PRECISIONS[precision]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(side * side * 4, device=device)
    target = torch.empty_like(source)
    product, _ = measure(lambda: a @ b, device, 10)
    copy, _ = measure(lambda: target.copy_(source), device, 10)
    return 2 * side**3 / product, 2 * source.nbytes / copy


class FloorCounter(TorchDispatchMode):
    """Add up the least time of matrix products, convolutions and scans."""

    def __init__(self, flops_rate: float, bandwidth: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops_rate, self.bandwidth = flops_rate, bandwidth
        self.seconds = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        is_scan = func.namespace == 'dynamicvis_geo' and 'selective_scan' in str(packet)
        if not is_scan and packet not in flop_registry:
            # A linear layer, for one, is counted as what it is made of.
            with self:
                parts = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if parts is NotImplemented else parts
        out = func(*args, **kwargs)
        tensors = [x for x in (*args, out) if isinstance(x, Tensor)]
        transfer = sum(x.nbytes for x in tensors) / self.bandwidth
        flops = 0 if is_scan else flop_registry[packet](*args, **kwargs, out_val=out)
        self.seconds += max(flops / self.flops_rate, transfer)
        return out


def floor_seconds(call: Call, flops_rate: float, bandwidth: float) -> float:
    with FloorCounter(flops_rate, bandwidth) as counter:
        call()
    seconds: float = counter.seconds
    return seconds


if __name__ == '__main__':
    main()
