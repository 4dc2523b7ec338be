"""What batch size, threads, precision and device do to the features.

The same chips are embedded in several ways, on one thread, and each way is compared
with one chip at a time in float32. "Equal routing" gives a way the gate logits of that
run, and so the same order of tokens: what is left is arithmetic.

Routing sorts thousands of numbers, so near-ties change places under any rounding; how
much that moves the features depends on how strongly the mixers act, which for the
published weights nobody could measure here. Hence two sets of weights: as initialised,
with mixers that do little, and lively ones, whose mixers move their tokens by about as
much as the tokens are.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import rasterio
import torch
import torch.nn.functional as F
from rasterio.windows import Window
from torch import Tensor

from dynamicvis_geo.commands.demo import synthetic_scene
from dynamicvis_geo.models import DynamicVis
from dynamicvis_geo.models.layers import Gate
from dynamicvis_geo.transforms import Preprocess

Result = tuple[Tensor, list[Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--image', type=Path, help='GeoTIFF of 3 bands (default: a demo)'
    )
    parser.add_argument('--input-range', type=float, nargs=2, default=(0, 10000))
    parser.add_argument(
        '--size', type=int, default=512, help='img_size of the backbone'
    )
    parser.add_argument('--chips', type=int, default=8)
    parser.add_argument('--threads', type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    chips = read_chips(options.image, options.chips)
    images = Preprocess(options.size, options.input_range)(chips)
    for name, liven in (('initial weights', False), ('lively weights', True)):
        torch.manual_seed(0)
        model = DynamicVis(img_size=options.size).eval()
        if liven:
            enliven(model)
        print(
            f'\n{name}, {len(images)} chips, img_size {options.size}, against one chip'
        )
        print('at a time in float32 (worst chip; worst cell; shares)\n')
        report(model, images, options.threads)


def report(model: DynamicVis, images: Tensor, threads: int) -> None:
    double = DynamicVis(img_size=model.img_size).double().eval()
    double.load_state_dict(model.state_dict())
    cuda = torch.cuda.is_available()
    base = one_by_one(model, images)
    routing = base[1]
    ways: dict[str, Callable[[], Result]] = {
        'again': lambda: one_by_one(model, images),
        f'one batch of {len(images)}': lambda: run(model, images),
        f'{threads} threads': lambda: with_threads(
            threads, lambda: one_by_one(model, images)
        ),
        "matmul precision 'medium'": lambda: with_precision(
            'medium', lambda: one_by_one(model, images)
        ),
        'float64': lambda: one_by_one(double, images.double()),
        'float64, equal routing': lambda: one_by_one(double, images.double(), routing),
        'bf16-mixed': lambda: one_by_one(model, images, bf16=True),
        'bf16-mixed, equal routing': lambda: one_by_one(
            model, images, routing, bf16=True
        ),
    }
    if cuda:
        gpu = DynamicVis(img_size=model.img_size).eval()
        gpu.load_state_dict(model.state_dict())
        ways['CUDA float32'] = lambda: one_by_one(gpu.cuda(), images.cuda())
        ways['CUDA bf16-mixed'] = lambda: one_by_one(
            gpu.cuda(), images.cuda(), bf16=True
        )
    print(f'{"":26}{"1 - cos pooled":>15}{"rel. L2 pooled":>15}', end='')
    print(f'{"1 - cos cell":>14}{"rerouted":>10}')
    for name, way in ways.items():
        print(f'{name:26}' + compare(base, way()), flush=True)


def compare(base: Result, other: Result) -> str:
    maps, logits = base
    pooled, pooled_other = (m.double().cpu().mean((2, 3)) for m in (maps, other[0]))
    vector = 1 - F.cosine_similarity(pooled, pooled_other)
    cell = 1 - F.cosine_similarity(maps.double().cpu(), other[0].double().cpu())
    error = (pooled - pooled_other).norm(dim=1) / pooled.norm(dim=1)
    moved = sum(
        int((order(a) != order(b)).sum()) for a, b in zip(logits, other[1], strict=True)
    )
    total = sum(order(a).numel() for a in logits)
    worst = f'{vector.max():15.1e}{error.max():15.1e}{cell.max():14.1e}'
    return f'{worst}{moved / total:10.2%}'


def order(logits: Tensor) -> Tensor:
    """The chosen tokens: one in 8, 4, 2 or 1, by the number of tokens."""
    weights = logits.cpu().softmax(1)
    stages = {r: i for i, r in enumerate(sorted(STAGE_TOKENS, reverse=True))}
    keep = weights.shape[1] // (8, 4, 2, 1)[stages[weights.shape[1]]]
    return weights.sort(dim=1, descending=True, stable=True).indices[:, :keep]


STAGE_TOKENS: set[int] = set()


def run(model: DynamicVis, images: Tensor) -> Result:
    seen: list[Tensor] = []
    hooks = [
        module.register_forward_hook(
            lambda _m, _i, out: seen.append(out[..., 0].float())
        )
        for module in model.modules()
        if isinstance(module, Gate)
    ]
    with torch.inference_mode():
        maps = model(images)[-1].float()
    for hook in hooks:
        hook.remove()
    STAGE_TOKENS.update(logits.shape[1] for logits in seen)
    # On the CPU a batch is done image by image, and each image calls every gate.
    gates = len(hooks)
    return maps, [torch.cat(seen[gate::gates]) for gate in range(gates)]


def one_by_one(
    model: DynamicVis,
    images: Tensor,
    routing: list[Tensor] | None = None,
    bf16: bool = False,
) -> Result:
    results = []
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        for index, image in enumerate(images):
            given = [logits[index : index + 1] for logits in routing or ()]
            with given_logits(given) if given else nullcontext():
                results.append(run(model, image[None]))
    logits = [torch.cat(parts) for parts in zip(*(r[1] for r in results), strict=True)]
    return torch.cat([r[0] for r in results]), routing or logits


@contextmanager
def given_logits(logits: list[Tensor]) -> Iterator[None]:
    """Let the gates say these, one after the other."""
    original, left = Gate.forward, iter(logits)

    def forward(self: Gate, x: Tensor) -> Tensor:
        given = next(left)[..., None]
        if x.dtype == torch.float64:
            # Weights that are equal in float32 stay so, and with them the order.
            given = given.softmax(1).double().log()
        return given

    setattr(Gate, 'forward', forward)  # noqa: B010
    try:
        yield
    finally:
        setattr(Gate, 'forward', original)  # noqa: B010


def with_precision(precision: str, way: Callable[[], Result]) -> Result:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        return way()
    finally:
        torch.set_float32_matmul_precision(before)


def with_threads(threads: int, way: Callable[[], Result]) -> Result:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return way()
    finally:
        torch.set_num_threads(before)


def enliven(model: DynamicVis) -> None:
    """Let mixers act about as strongly as those of the golden files do."""
    for name, parameter in model.named_parameters():
        if name.endswith(('spatial_gate.weight', 'out_proj.weight', 'x_proj.weight')):
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        if name.endswith('pos_embed'):
            torch.nn.init.normal_(parameter, std=0.5)


def read_chips(path: Path | None, count: int) -> Tensor:
    """Cut the first chips of 256 pixels from an image, row by row."""
    if path is None:
        pixels = torch.from_numpy(synthetic_scene().astype('float32'))
    else:
        with rasterio.open(path) as file:
            whole = Window(0, 0, file.width, file.height)
            pixels = torch.from_numpy(
                file.read((1, 2, 3), window=whole).astype('float32')
            )
    tiles = pixels.unfold(1, 256, 256).unfold(2, 256, 256)
    return tiles.permute(1, 2, 0, 3, 4).flatten(0, 1)[:count].contiguous()


if __name__ == '__main__':
    main()
