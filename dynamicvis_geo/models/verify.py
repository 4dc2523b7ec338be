"""The native backbone compared with the official code, on a user's own machine.

Two runs of the same network differ by rounding, and rounding alone can swap two tokens
of almost the same weight, after which features differ visibly: at 512 pixels that
happens in nearly every image, also between the official code and itself. A comparison
of the outputs alone would therefore either miss mistakes or report differences that are
none. So the comparison is made twice:

- each implementation chooses its tokens itself: what a user sees;
- ours is given the official gate logits, so that both route alike. What differs then is
  rounding or a mistake, and rounding is known: it is what our own results in float32
  differ from those in float64. The gate logits are compared as well.

The implementations agree if, routed alike, they differ by no more than
:data:`ROUNDINGS` times that rounding, or :data:`FLOOR`; never by more than
:data:`CEILING`.

The official code runs in float32, also on CUDA. Ours runs as `predict` runs it, in the
same precision and under the settings of the process.
"""

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.models.config import BackboneConfig
from dynamicvis_geo.models.dynamicvis import DynamicVis
from dynamicvis_geo.models.mamba2 import Mamba2Mixer
from dynamicvis_geo.models.precision import float32_products
from dynamicvis_geo.models.upstream import UpstreamSource, upstream_source
from dynamicvis_geo.models.weights import load_backbone

#: Relative error that is always tolerated, and the one that never is.
FLOOR, CEILING = 1e-5, 1e-4
#: Tolerated multiple of our own rounding.
ROUNDINGS = 10.0
#: Those that `predict` offers.
PRECISIONS = ('32-true', 'bf16-mixed')


@dataclass(frozen=True)
class Difference:
    """The distance of one kind of result from the official one.

    Attributes:
        name: of the result, such as 'stage 3'.
        own_routing: relative L2 error where each implementation chose its own tokens;
            None for gate logits, which make the choice.
        same_routing: the same where ours was given the official choice.
        rounding: what our results under that choice differ from those in float64.
    """

    name: str
    own_routing: float | None
    same_routing: float
    rounding: float

    @property
    def tolerance(self) -> float:
        """Largest error under the same routing that counts as agreement."""
        return min(max(FLOOR, ROUNDINGS * self.rounding), CEILING)

    @property
    def agrees(self) -> bool:
        """True if the error is within the tolerance; not if it is no number."""
        return self.same_routing <= self.tolerance


@dataclass(frozen=True)
class Report:
    """The outcome of a comparison; the worst image counts.

    Attributes:
        differences: of the gate logits and of each stage's map.
        pooled_cosine: smallest cosine similarity of the pooled vectors, each
            implementation having chosen its own tokens.
        rerouted: share of the chosen tokens whose place in the order differs.
        seconds: for one image, of the official code and of ours.
        images: number of images.
        about: what was compared, for the reader.
    """

    differences: tuple[Difference, ...]
    pooled_cosine: float
    rerouted: float
    seconds: tuple[float, float]
    images: int
    about: Mapping[str, str]

    @property
    def agrees(self) -> bool:
        """True if the implementations agree in everything."""
        return all(difference.agrees for difference in self.differences)


def verify(
    config: BackboneConfig,
    images: Tensor | None = None,
    *,
    device: str | torch.device = 'cpu',
    precision: str = '32-true',
    count: int = 2,
    seed: int = 0,
) -> Report:
    """Run the official code and ours with the same weights on the same images.

    Args:
        config: weights and settings; its `implementation` does not matter.
        images: normalised images ``[N, 3, H, W]`` of ``config.img_size``; None means
            *count* images of :func:`example_images`.
        device: where both run.
        precision: of ours, '32-true' or 'bf16-mixed', as a Trainer takes it.
        count: number of generated images.
        seed: of the generated images.

    Returns:
        The differences, and whether the two agree.

    Raises:
        CheckpointError: if the weights cannot be loaded.
        UpstreamError: if the official code cannot be run.
        SpecError: if the configuration, *images* or *precision* cannot be used.
    """
    if images is None:
        images = example_images(count, config.img_size, seed)
    official, _ = load_backbone(replace(config, implementation='upstream'))
    ours, made = load_backbone(replace(config, implementation='native'))
    device = torch.device(device)
    if config.mamba2:
        _match_head_groups(ours, device)
    report = compare(
        official.to(device), ours.to(device), images.to(device), precision=precision
    )
    about = _about(made, cast(DynamicVis, ours), upstream_source(type(official)))
    about |= {
        'device': f'{device}, {torch.get_num_threads()} threads',
        'precision': f'{precision}, against float32 of the official code',
        'torch': torch.__version__,
    }
    about |= {k: str(v) for k, v in cast(DynamicVis, ours).numerics(device).items()}
    return replace(report, about=about)


def _about(
    made: Mapping[str, Any], ours: DynamicVis, source: UpstreamSource
) -> dict[str, str]:
    """Name the weights, the settings and the official code that are compared."""
    settings = ours.settings
    pinned = 'the pinned one'
    if not source.is_pinned:
        pinned = f'NOT the pinned one, {BackboneConfig.repo_commit}'
    edited = {True: 'EDITED', False: 'as committed', None: 'unknown whether edited'}
    return {
        'weights': str(made.get('file') or made['weights']),
        'SHA-256': str(made.get('sha256') or f'none, seed {made.get("seed")}'),
        'arch': settings.pop('arch'),
        'image size': '{} x {}'.format(*settings.pop('img_size')),
        **{
            name: ', '.join(map(str, value)) if isinstance(value, list) else str(value)
            for name, value in settings.items()
        },
        'official code': str(source.file),
        'commit': f'{source.commit} ({pinned})'
        if source.commit
        else 'no git repository',
        'files': edited[source.edited],
    }


def compare(
    official: nn.Module, ours: nn.Module, images: Tensor, *, precision: str = '32-true'
) -> Report:
    """Compare two backbones with the official names of submodules.

    Args:
        official: the reference, in eval mode.
        ours: what is compared with it, in eval mode; also run in float64.
        images: normalised images ``[N, 3, H, W]``, on the device of both.
        precision: of ours, '32-true' or 'bf16-mixed', as a Trainer takes it.

    Returns:
        The differences, and whether the two agree.

    Raises:
        SpecError: if *images* is no batch of images, or *precision* is another.
    """
    if images.ndim != 4 or not len(images):
        raise SpecError(
            f'images has shape {tuple(images.shape)}: give [N, 3, H, W], N at least 1'
        )
    if precision not in PRECISIONS:
        raise SpecError(
            f'precision={precision!r} is unknown: choose one of {", ".join(PRECISIONS)}'
        )
    exact = copy.deepcopy(ours).double()
    with torch.inference_mode():
        results = [
            _compare_one(official, ours, exact, image, precision)
            for image in images.split(1)
        ]
    columns = zip(*(result.differences for result in results), strict=True)
    times = zip(*(result.seconds for result in results), strict=True)
    return Report(
        tuple(_worst(column) for column in columns),
        pooled_cosine=min(result.pooled_cosine for result in results),
        rerouted=sum(result.rerouted for result in results) / len(results),
        seconds=tuple(min(column) for column in times),
        images=len(results),
        about={},
    )


def format_report(report: Report) -> str:
    """Write a report as lines for a terminal.

    Args:
        report: what :func:`verify` or :func:`compare` gave.

    Returns:
        Lines, joined.
    """
    lines = [f'{name}: {value}' for name, value in report.about.items()]
    lines += [
        '',
        f'Relative L2 error, worst of {report.images} images:',
        f'{"":12}{"own routing":>13}{"same routing":>14}{"tolerance":>12}',
    ]
    for row in report.differences:
        own = '' if row.own_routing is None else f'{row.own_routing:.1e}'
        verdict = '' if row.agrees else '  beyond tolerance'
        lines.append(
            f'{row.name:12}{own:>13}{row.same_routing:>14.1e}{row.tolerance:>12.1e}'
            f'{verdict}'
        )
    official, ours = report.seconds
    lines += [
        '',
        f'Pooled vectors, own routing: cosine similarity {report.pooled_cosine:.9f}',
        f'Tokens routed differently: {report.rerouted:.4%}',
        f'Seconds an image: official {official:.3f}, native {ours:.3f}',
        'The implementations agree.' if report.agrees else 'They DISAGREE.',
    ]
    return '\n'.join(lines)


def example_images(count: int, img_size: int | tuple[int, int], seed: int) -> Tensor:
    """Make images with the statistics of normalised ones: fields, edges and noise.

    Args:
        count: number of images.
        img_size: pixels of a side, or (height, width).
        seed: the same seed gives the same images.

    Returns:
        float32 ``[count, 3, H, W]``.
    """
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 8, 8, generator=generator)
    smooth = torch.randn(count, 3, 8, 8, generator=generator)
    fine = torch.randn(count, 3, *size, generator=generator)
    return (
        0.6 * F.interpolate(coarse, size, mode='nearest')
        + 0.6 * F.interpolate(smooth, size, mode='bicubic', align_corners=False)
        + 0.4 * fine
    )


@dataclass(frozen=True)
class _Run:
    """The inside of a run: tokens after each stage, logits of each gate."""

    stages: list[Tensor]
    logits: dict[str, Tensor]
    seconds: float

    @property
    def pooled(self) -> Tensor:
        return self.stages[-1].mean(1)


def _compare_one(
    official: nn.Module,
    ours: nn.Module,
    exact: nn.Module,
    image: Tensor,
    precision: str,
) -> Report:
    seed = getattr(ours, 'shuffle_seed', 0)
    with float32_products(), _StableTopk():
        reference = _run(official, image, seed)
    with torch.autocast(image.device.type, torch.bfloat16, precision == 'bf16-mixed'):
        own = _run(ours, image, seed)
        alike = _run(ours, image, seed, reference.logits)
    # Weights that are equal in float32 are to stay so, or the order would differ.
    routing = {
        name: F.softmax(logits[..., 0], dim=-1)[..., None].double().log()
        for name, logits in reference.logits.items()
    }
    truth = _run(exact, image.double(), seed, routing)
    differences = [
        Difference(
            f'stage {stage}',
            _relative_l2(own.stages[stage], expected),
            _relative_l2(alike.stages[stage], expected),
            _relative_l2(alike.stages[stage], truth.stages[stage]),
        )
        for stage, expected in enumerate(reference.stages)
    ]
    if reference.logits:
        gates = [
            Difference(
                'gate logits',
                None,
                _relative_l2(_spread(alike.logits[name]), _spread(expected)),
                _relative_l2(_spread(alike.logits[name]), _spread(truth.logits[name])),
            )
            for name, expected in reference.logits.items()
        ]
        differences.insert(0, _worst(gates))
    cosine = F.cosine_similarity(own.pooled.double(), reference.pooled.double())
    return Report(
        tuple(differences),
        pooled_cosine=float(cosine),
        rerouted=_rerouted(ours, reference.logits, own.logits),
        seconds=(reference.seconds, own.seconds),
        images=1,
        about={},
    )


def _run(
    model: nn.Module,
    image: Tensor,
    seed: int,
    forced: Mapping[str, Tensor] | None = None,
) -> _Run:
    """Run a backbone and look inside, with gate logits given in place of its own."""
    stages: list[Tensor] = []
    logits: dict[str, Tensor] = {}

    def keep_stage(module: nn.Module, args: Any, output: Tensor) -> None:
        stages.append(output.clone())

    def gate_hook(name: str) -> Any:
        def keep_logits(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            logits[name] = output.clone()
            return None if forced is None else forced[name].clone()

        return keep_logits

    layers: Any = model.layers
    handles = [layer[2].register_forward_hook(keep_stage) for layer in layers]
    handles += [
        gate.register_forward_hook(gate_hook(name)) for name, gate in _gates(model)
    ]
    try:
        # The permutations of the shuffle paths: the official code draws them from the
        # global generator, ours from one with this seed.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            _synchronize(image.device)
            start = time.perf_counter()
            model(image)
            _synchronize(image.device)
            seconds = time.perf_counter() - start
    finally:
        for handle in handles:
            handle.remove()
    return _Run(stages, logits, seconds)


def _gates(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if name.endswith('.spatial_gate')
    ]


class _StableTopk(TorchFunctionMode):
    """Makes `torch.topk` choose among equals by position, as the native backbone does.

    Among 16384 weights a few are equal in float32, and which of those comes first is
    left open by topk.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.topk:
            return _stable_topk(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _stable_topk(x: Tensor, k: int, dim: int = -1) -> tuple[Tensor, Tensor]:
    values, indices = x.sort(dim=dim, descending=True, stable=True)
    return values.narrow(dim, 0, k), indices.narrow(dim, 0, k)


def _rerouted(
    ours: nn.Module, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> float:
    """Give the share of places in the orders of tokens that hold another token."""
    differing = total = 0
    for name, gate in expected.items():
        mixer = ours.get_submodule(name.rpartition('.')[0])
        kept = gate.shape[1] // int(mixer.reduction)  # type: ignore[arg-type]
        orders = [
            _stable_topk(F.softmax(logits[..., 0], dim=1), kept)[1]
            for logits in (gate, found[name])
        ]
        differing += int((orders[0] != orders[1]).sum())
        total += orders[0].numel()
    return differing / total if total else 0.0


def _relative_l2(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def _spread(logits: Tensor) -> Tensor:
    """Take off what all tokens have in common: softmax takes no notice of it."""
    logits = logits.double()
    return logits - logits.mean(1, keepdim=True)


def _worst(differences: Sequence[Difference]) -> Difference:
    """Take what is furthest beyond its tolerance; NaN comes first."""

    def severity(difference: Difference) -> float:
        ratio = difference.same_routing / difference.tolerance
        return math.inf if math.isnan(ratio) else ratio

    own = [d.own_routing for d in differences if d.own_routing is not None]
    worst = max(differences, key=severity)
    return replace(worst, own_routing=max(own, default=None))


def _match_head_groups(ours: nn.Module, device: torch.device) -> None:
    """Let our Mamba-2 group its heads as the official code does on this device."""
    module = 'transformers.models.mamba2.modeling_mamba2'
    kernels = device.type == 'cuda' and import_module(module).is_fast_path_available
    groups: Any = 'contiguous' if kernels else 'tiled'
    for mixer in ours.modules():
        if isinstance(mixer, Mamba2Mixer):
            mixer.head_groups = groups


def _synchronize(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
