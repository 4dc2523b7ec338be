"""All that only a CUDA GPU can show of the backbone, in one call of a few minutes.

    python -m benchmarks.backbone_gpu

It needs PyTorch with Triton and this package, no data, no weights and no network; the
row of `Trainer.predict` needs Lightning.

First every kernel is compared with float64. Then comes the comparison of
``dynamicvis-geo verify``, with our PyTorch form in the place of the official code;
features of the CPU against those of the GPU; and `Trainer.predict` against the forward
alone. Last, one table gives, for each architecture, batch size and precision:

- ms an image, and images a second;
- the floor: the time of the floating-point operations of all products at the rate
  of a large product, and of the least bytes at the rate of a large copy, whichever is
  more. Both rates are measured here, in the precision of the row;
- the same model with other forms of the scan: ``graph`` is what predictions run, the
  fused kernels replayed as one CUDA graph; ``fused`` launches them one by one;
  ``mamba_ssm`` and ``torch`` are the general form around the scan of the package
  mamba-ssm, where it is installed, and around PyTorch's. A graph of these two forms,
  too, is what is timed, so that kernels are compared and not launches.

Weights and images are random. Times are medians.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from dynamicvis_geo.models import DynamicVis, scan

PRECISIONS = {'float32': torch.float32, 'bf16': torch.bfloat16}
FORMS = ('graph', 'fused', 'mamba_ssm', 'torch')
ROW = '{:>4} {:>5}  {:<7}  {:<9} {:>9} {:>9} {:>8} {:>8} {:>8} {:>9}'
#: Relative L2 errors that a kernel may have, for outputs of each dtype.
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
Call = Callable[[], Any]


def main() -> None:
    args = parse_arguments()
    if not torch.cuda.is_available():
        sys.exit('PyTorch finds no CUDA GPU: run this on a machine with one')
    torch.set_grad_enabled(False)
    torch.set_float32_matmul_precision('highest')
    torch.backends.cudnn.allow_tf32 = False
    print(describe())
    failed = [] if args.no_checks else check_kernels()
    failed += compare_forms()
    compare_devices()
    print_predict()
    print_table(args)
    if failed:
        sys.exit('Beyond the bounds: ' + '; '.join(failed))
    print('All within the bounds.')


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--arch', nargs='+', default=['b', 'l'], choices=['b', 'l'])
    parser.add_argument('--batch-size', type=int, nargs='+', default=[1, 8, 32, 128])
    parser.add_argument('--forms', nargs='+', choices=FORMS, default=list(FORMS))
    parser.add_argument('--no-checks', action='store_true', help='only measure')
    return parser.parse_args()


def describe() -> str:
    import triton

    properties = torch.cuda.get_device_properties(0)
    return (
        f'{properties.name}, {properties.multi_processor_count} multiprocessors, '
        f'{properties.total_memory / 2**30:.0f} GiB; Python '
        f'{platform.python_version()}, torch {torch.__version__}, triton '
        f'{triton.__version__}, CUDA {torch.version.cuda}'
    )


# --- Kernels against float64 -------------------------------------------------------


def check_kernels() -> list[str]:
    """Compare each kernel with float64, and print the worst error of each kind."""
    worst: dict[tuple[str, torch.dtype], float] = {}
    start = time.perf_counter()
    for name, dtype, error in [*scan_errors(), *convolution_errors(), *patch_errors()]:
        key = name, dtype
        worst[key] = max(worst.get(key, 0.0), error)
    print('\nRelative L2 error against float64, worst of all shapes of b and l:')
    failed = []
    for (name, dtype), error in sorted(worst.items(), key=str):
        verdict = '' if error <= BOUNDS[dtype] else '  BEYOND'
        failed += [f'{name} {dtype}'] if verdict else []
        print(f'  {name:<16} {str(dtype)[6:]:<9} {error:.1e}{verdict}')
    print(f'  ({time.perf_counter() - start:.0f} s)')
    return failed


def shapes() -> list[tuple[int, int, int]]:
    """Sequences of both architectures, and lengths of 1 and odd: (B, L, channels)."""
    widths = {'b': (96, 192, 384, 768), 'l': (128, 256, 512, 1024)}
    real = [
        (batch, length, 2 * width)
        for arch in widths
        for length, width in zip((2176, 1088, 544, 272), widths[arch], strict=True)
        for batch in (1, 3, 32)
    ]
    return [*real, (1, 1, 192), (2, 1, 768), (1, 7, 192), (3, 33, 384), (1, 1087, 768)]


def scan_errors() -> Iterator[tuple[str, torch.dtype, float]]:
    for batch, length, channels in shapes():
        for dtype in BOUNDS:
            inputs = scan_inputs(batch, length, channels, dtype)
            y = scan.run_scan('triton', *inputs)
            expected = scan.selective_scan(*(t.double() for t in inputs))
            yield 'scan', dtype, relative_error(y, expected)
    inputs = scan_inputs(1, 64, 192, torch.float32)
    inputs[1][0, 0, 40, 5] = torch.nan
    y = scan.run_scan('triton', *inputs)[0, 0]
    right = y[40:, 5].isnan().all() and y.isnan().sum() == 24
    yield 'NaN in the scan', torch.float32, 0.0 if right else torch.inf


def scan_inputs(
    batch: int, length: int, channels: int, dtype: torch.dtype, states: int = 16
) -> list[Tensor]:
    def randn(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, device='cuda', dtype=dtype)

    rates = torch.arange(1, states + 1, device='cuda').float()
    projected = randn(2, batch, length, 12 + 2 * states)
    return [
        randn(2, batch, length, channels),
        randn(2, batch, length, channels),
        -rates * torch.exp(0.1 * randn(channels, states, dtype=torch.float32)),
        projected[..., 12 : 12 + states],
        projected[..., 12 + states :],
        randn(channels, dtype=torch.float32),
        randn(channels, dtype=torch.float32) - 3.5,
        randn(batch, length, 2 * channels)[..., channels:],
    ]


def convolution_errors() -> Iterator[tuple[str, torch.dtype, float]]:
    for batch, length, channels in shapes():
        for dtype in BOUNDS:
            x = torch.randn(batch, length, 2 * channels, device='cuda', dtype=dtype)
            x = x[..., :channels]
            weight = torch.randn(channels, 1, 4, device='cuda')
            bias = torch.randn(channels, device='cuda')
            y = scan.run_conv('triton', x, weight, bias, 2)
            exact = (t.double() for t in (x, weight, bias))
            yield 'convolution', dtype, relative_error(y, scan.causal_conv(*exact, 2))


def patch_errors() -> Iterator[tuple[str, torch.dtype, float]]:
    from dynamicvis_geo.models.patches_triton import convolve_tokens, split_filters

    for widths in ((96, 192, 384, 768), (128, 256, 512, 1024)):
        for stage in range(3):
            conv = nn.Conv2d(*widths[stage : stage + 2], 3, 2, 1, bias=False).cuda()
            for batch in (1, 3):
                side = 128 >> stage
                x = torch.randn(batch, widths[stage], side, side, device='cuda')
                x = x.contiguous(memory_format=torch.channels_last)
                y = convolve_tokens(x, conv, split_filters(conv))
                expected = nn.functional.conv2d(
                    x.double(), conv.weight.double(), None, 2, 1
                )
                yield 'patches', torch.float32, relative_error(y, expected)


def relative_error(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


# --- Times ---------------------------------------------------------------------------


def print_table(args: argparse.Namespace) -> None:
    rates = {name: measure_rates(dtype) for name, dtype in PRECISIONS.items()}
    torch.cuda.empty_cache()
    print()
    for name, (flops, bandwidth) in rates.items():
        print(
            f'{name}: {flops / 1e12:.0f} TFLOP/s in a matrix product, '
            f'{bandwidth / 1e9:.0f} GB/s in a copy'
        )
    header = 'arch', 'batch', 'numbers', 'form', 'ms/image', 'images/s'
    print(ROW.format(*header, 'of torch', 'floor ms', 'share', 'memory'))
    for arch in args.arch:
        torch.manual_seed(0)
        model = lively(DynamicVis(arch)).eval().cuda()
        for batch_size in args.batch_size:
            for precision in PRECISIONS:
                print_rows(args, model, batch_size, precision, rates[precision])


def print_rows(
    args: argparse.Namespace,
    model: DynamicVis,
    batch_size: int,
    precision: str,
    rates: tuple[float, float],
) -> None:
    floor = floor_seconds(model, PRECISIONS[precision], *rates)
    results: dict[str, tuple[float, float]] = {}
    for form in args.forms:
        if form == 'mamba_ssm' and find_spec('mamba_ssm') is None:
            continue
        if form == 'torch' and batch_size > 32:
            continue
        try:
            with as_form(model, form):
                results[form] = measure(prepare(model, batch_size, precision, form))
        except torch.cuda.OutOfMemoryError:
            print(
                ROW.format(model.arch, batch_size, precision, form, *['no memory'] * 6)
            )
        torch.cuda.empty_cache()
    for form, (seconds, gigabytes) in results.items():
        each = seconds / batch_size
        slow = results.get('torch', (None,))[0]
        print(
            ROW.format(
                *(model.arch, batch_size, precision, form),
                f'{each * 1e3:.3f}',
                f'{1 / each:.0f}',
                f'{slow / seconds:.1f}' if slow else '-',
                f'{floor * 1e3:.3f}',
                f'{floor / each:.2f}',
                f'{gigabytes:.2f} GB',
            ),
            flush=True,
        )


@contextmanager
def as_form(model: DynamicVis, form: str) -> Iterator[None]:
    """Let a model run the general form around another scan."""
    name = 'auto' if form in ('graph', 'fused') else 'torch'
    holders = [model, *(m for m in model.modules() if hasattr(m, 'split_sizes'))]
    general = scan.selective_scan
    if form == 'mamba_ssm':
        setattr(scan, 'selective_scan', mamba_ssm_scan)  # noqa: B010
    for holder in holders:
        holder.scan = name
    try:
        yield
    finally:
        setattr(scan, 'selective_scan', general)  # noqa: B010
        for holder in holders:
            holder.scan = 'auto'


def mamba_ssm_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    gate: Tensor,
) -> Tensor:
    """Scan by the kernel of mamba-ssm, which knows one direction and channels first."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def turn(x: Tensor) -> Tensor:
        return x if len(x) == 1 else torch.stack([x[0], x[1].flip(1)])

    def sequences(x: Tensor) -> Tensor:
        return turn(x.to(u.dtype)).flatten(0, 1).mT.contiguous()

    y = selective_scan_fn(
        *(sequences(u), sequences(dt), A.float(), sequences(B), sequences(C)),
        D.float(),
        z=sequences(gate.expand_as(u)),
        delta_bias=dt_bias.float(),
        delta_softplus=True,
    )
    return turn(y.to(u.dtype).mT.unflatten(0, u.shape[:2]))


def prepare(model: DynamicVis, batch_size: int, precision: str, form: str) -> Call:
    image = torch.randn(batch_size, 3, *model.img_size, device='cuda')

    def forward() -> Any:
        # Autocast keeps copies of the weights while it lasts, which a graph must not.
        with torch.autocast(
            'cuda', torch.bfloat16, enabled=precision == 'bf16', cache_enabled=False
        ):
            return model(image)

    return forward if form == 'fused' else capture(forward)


def capture(forward: Call) -> Call:
    """Record the kernels of a call, to replay them without Python."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = forward()

    def replay() -> Any:
        graph.replay()
        return outputs

    return replay


def measure(call: Call, repeats: int = 10) -> tuple[float, float]:
    """Give the median seconds of a call and the most memory in gigabytes."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    seconds = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return statistics.median(seconds), torch.cuda.memory_reserved() / 1e9


def measure_rates(dtype: torch.dtype, side: int = 8192) -> tuple[float, float]:
    """Measure FLOPs a second of a matrix product, and bytes a second of a copy."""
    a, b = (torch.randn(side, side, device='cuda', dtype=dtype) for _ in range(2))
    source = torch.randn(side * side * 4, device='cuda')
    target = torch.empty_like(source)
    product, _ = measure(lambda: a @ b)
    copy, _ = measure(lambda: target.copy_(source))
    return 2 * side**3 / product, 2 * source.nbytes / copy


def floor_seconds(
    model: DynamicVis, dtype: torch.dtype, flops_rate: float, bandwidth: float
) -> float:
    """Give the least time of an image: of its products, or of its bytes."""
    flops = moved = 0.0
    height, width = model.img_size
    for patch_embed, mixers, _ in model.layers:  # type: ignore[misc]
        conv = patch_embed.projection
        stride = conv.stride[0]
        height, width = -(-height // stride), -(-width // stride)
        count = height * width
        flops += 2 * count * conv.weight.numel()
        moved += 2 * 4 * count * conv.out_channels  # made once, and read by the next
        for mixer in mixers:
            layer = mixer.spatial_mamba_mixer.mamba_layer
            length = mixer.global_tokens + count // mixer.reduction
            once = layer.in_proj.weight.numel() + layer.out_proj.weight.numel()
            twice = layer.x_proj.weight.numel() + layer.dt_proj.weight.numel()
            flops += 2 * length * (once + 2 * twice)
            # Tokens in and out; input, steps and output of the scan; its gate.
            inner = length * layer.out_proj.in_features * dtype.itemsize
            moved += 2 * 4 * count * conv.out_channels + (2 * 3 + 1) * inner
    return max(flops / flops_rate, moved / bandwidth)


# --- Features ------------------------------------------------------------------------


def lively(model: DynamicVis) -> DynamicVis:
    """Give untrained mixers some strength, so that a mistake in them would show."""
    for name, parameter in model.named_parameters():
        if name.endswith('spatial_gate.weight'):
            nn.init.normal_(parameter, std=parameter.numel() ** -0.5)
        elif name.endswith('x_proj.weight'):
            parameter *= 3
    return model


def compare_forms() -> list[str]:
    """Compare the fused kernels with the PyTorch form, both given the same routing."""
    from dynamicvis_geo.models.verify import compare, example_images

    failed = []
    print('\nFused kernels against the PyTorch form (verify), under equal routing:')
    for arch in ('b', 'l'):
        torch.manual_seed(0)
        ours = lively(DynamicVis(arch)).eval().cuda()
        general = DynamicVis(arch, scan='torch').eval().cuda()
        general.load_state_dict(ours.state_dict())
        images = example_images(2, 512, 0).cuda()
        for precision in ('32-true', 'bf16-mixed'):
            report = compare(general, ours, images, precision=precision)
            errors = ', '.join(
                f'{d.name} {d.same_routing:.1e}' for d in report.differences
            )
            print(
                f'  {arch} {precision}: {errors}; own routing: rerouted '
                f'{report.rerouted:.2%}, pooled cosine {report.pooled_cosine:.9f}',
                flush=True,
            )
            if precision == '32-true' and not report.agrees:
                failed.append(f'{arch} against the PyTorch form')
    return failed


def compare_devices() -> None:
    """Compare features of the CPU and of the GPU, each with a routing of its own."""
    from dynamicvis_geo.models.verify import example_images

    torch.manual_seed(0)
    model = lively(DynamicVis('b')).eval()
    images = example_images(2, 512, 1)
    (expected,) = model(images)
    model.cuda()
    print('\nGPU against CPU, each with its own routing (relative L2, pooled):')
    for precision in PRECISIONS:
        with torch.autocast('cuda', torch.bfloat16, enabled=precision == 'bf16'):
            (found,) = model(images.cuda())
        error = relative_error(found.cpu().mean((2, 3)), expected.double().mean((2, 3)))
        print(f'  {precision}: {error:.1e}')


def print_predict() -> None:
    """Compare `Trainer.predict` over images in memory with the forward alone."""
    try:
        from lightning.pytorch import Callback, Trainer
    except ImportError:
        print('\nTrainer.predict was not measured: Lightning is not installed')
        return
    from dynamicvis_geo.models import BackboneConfig
    from dynamicvis_geo.tasks.features import FeatureExtraction
    from dynamicvis_geo.transfer import CopiesAhead

    batch_size, batches, skipped = 32, 60, 10

    class Clock(Callback):
        def on_predict_batch_start(self, *_: Any) -> None:
            if _[3] == skipped:
                torch.cuda.synchronize()
                self.start = time.perf_counter()

        def on_predict_end(self, *_: Any) -> None:
            torch.cuda.synchronize()
            self.seconds = time.perf_counter() - self.start

    module = FeatureExtraction(BackboneConfig(weights='random'))
    images = [
        (torch.rand(batch_size, 3, 512, 512) * 4000).pin_memory() for _ in range(2)
    ]
    samples = [{'image': images[i % 2]} for i in range(batches)]

    class Memory(CopiesAhead):
        def predict_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(samples, batch_size=None)  # type: ignore[arg-type]

    clock = Clock()
    trainer = Trainer(
        accelerator='gpu',
        devices=1,
        precision='bf16-mixed',
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock],
    )
    trainer.predict(module, datamodule=Memory(), return_predictions=False)
    rate = (batches - skipped) * batch_size / clock.seconds
    model = module.backbone.cuda()
    seconds, _ = measure(prepare(model, batch_size, 'bf16', 'graph'))  # type: ignore[arg-type]
    bare = batch_size / seconds
    print(
        f'\nTrainer.predict, bf16-mixed, batches of {batch_size} in page-locked '
        f'memory: {rate:.0f} chips a second, {rate / bare:.2f} of the forward alone '
        f'({bare:.0f})'
    )


if __name__ == '__main__':
    main()
