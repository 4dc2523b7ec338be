"""Fetching the official weights, and building the backbone that they are for."""

import contextlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from torch import Tensor, nn
from torchvision.models import Weights, WeightsEnum

from dynamicvis_geo.errors import CheckpointError, SpecError
from dynamicvis_geo.models.checkpoint import Checkpoint, load_into, read_checkpoint
from dynamicvis_geo.models.config import BackboneConfig, following
from dynamicvis_geo.models.dynamicvis import DynamicVis, check_stages
from dynamicvis_geo.models.upstream import build_upstream, upstream_source
from dynamicvis_geo.transforms import Preprocess

#: How names of files end that may hold weights.
_SUFFIXES = ('.bin', '.ckpt', '.pt', '.pth', '.safetensors')
#: Seed of the weights of ``weights='random'``.
RANDOM_SEED = 0

# The errors of whichever HTTP library this version of huggingface_hub has, and OSError.
_HUB_ERRORS = cast(
    tuple[type[Exception], ...],
    (HFValidationError, OSError, *HfHubHTTPError.__bases__),
)


def load_backbone(
    config: BackboneConfig, out_indices: Sequence[int] = (3,)
) -> tuple[nn.Module, dict[str, Any]]:
    """Build the backbone of a configuration, with its weights, for inference.

    Args:
        config: Which weights and which implementation.
        out_indices: Stages whose maps it returns, 0 to 3.

    Returns:
        The backbone, frozen and in eval mode, on the CPU, in float32; it takes
        normalised images ``[B, 3, H, W]`` of ``config.img_size`` and returns a tuple of
        one map ``[B, C, h, w]`` a stage. And its provenance, as plain values for JSON.

    Raises:
        CheckpointError: If the checkpoint cannot be fetched or read, is not the one
            asked for, or does not fit the configuration.
        SpecError: If the configuration cannot be built, or there are no such stages.
        UpstreamError: If ``implementation='upstream'`` and the official code cannot be
            run.
    """
    stages = check_stages(out_indices)
    if config.weights == 'random':
        model, provenance = _random_backbone(config)
    else:
        model, provenance = _pretrained_backbone(config)
    model.eval()
    model.requires_grad_(False)
    model.out_indices = stages
    provenance |= {
        'arch': model.arch,
        'path_type': model.path_type,
        'sampling_scale': _as_json(model.sampling_scale),
        'mamba2': model.mamba2,
        'img_size': list(model.img_size),
        'implementation': config.implementation,
        'feature_kind': 'featmap',
        'dtype': 'float32',
        'settings': model.settings,
        'parameters': _statistics(model),
    }
    if config.implementation == 'upstream':
        trained = provenance.get('trained_settings', {})
        official = build_upstream(config, model.arch, trained, stages)
        official.load_state_dict(model.state_dict())
        source = upstream_source(type(official))
        provenance['upstream_commit'] = source.commit
        provenance['upstream_edited'] = source.edited
        if model.mamba2:
            # Not ours to set: transformers groups them otherwise on CPUs and on GPUs.
            provenance['settings']['mamba2_head_groups'] = 'by device'
        return official, provenance
    provenance['scan'] = model.scan
    if 'shuffle' in model.path_type:
        provenance['shuffle_seed'] = model.shuffle_seed
    return model, provenance


def fetch_checkpoint(
    hf_repo: str,
    ckpt_file: str,
    revision: str = 'main',
    *others: str,
    cache_dir: str | Path | None = None,
) -> Path:
    """Return the path of a checkpoint in Hugging Face's cache, downloaded if need be.

    The environment variables of huggingface_hub (``HF_HOME``, ``HF_ENDPOINT``,
    ``HF_HUB_OFFLINE``, ``HF_TOKEN``) have the effect that its documentation tells.

    Args:
        hf_repo: Repository, as ``owner/name``.
        ckpt_file: File in that repository.
        revision: Branch, tag or commit.
        *others: Further names, tried in order if there is no such file.
        cache_dir: Another folder for the cache than Hugging Face's own.

    Returns:
        The file in the cache.

    Raises:
        CheckpointError: If the file is not to be had; it says what to do, and what the
            repository holds instead.
    """
    names = (ckpt_file, *others)
    endpoint = _endpoint()
    for name in names:
        with _hub_errors(name, hf_repo, revision):
            try:
                return Path(
                    hf_hub_download(
                        hf_repo,
                        name,
                        revision=revision,
                        endpoint=endpoint,
                        cache_dir=cache_dir,
                    )
                )
            except LocalEntryNotFoundError:
                if name == names[-1]:
                    raise
            except EntryNotFoundError:
                continue
    reason = 'there is no such file' + (' under either name' if others else '')
    try:
        held = ', '.join(list_checkpoints(hf_repo, revision)) or 'no checkpoint'
        remedy = f'the repository holds {held}: give one of these as ckpt_file'
    except CheckpointError:
        remedy = f'take one of {endpoint}/{hf_repo}/tree/{revision} as ckpt_file'
    what = _from_the_hub(' or '.join(names), hf_repo, revision)
    raise _not_to_be_had(what, reason, remedy)


def list_checkpoints(hf_repo: str, revision: str = 'main') -> list[str]:
    """Name the files of a Hugging Face repository that may be checkpoints.

    Args:
        hf_repo: Repository, as ``owner/name``.
        revision: Branch, tag or commit.

    Returns:
        Names of files, sorted.

    Raises:
        CheckpointError: If the repository cannot be looked into; it says what to do.
    """
    with _hub_errors('the list of files', hf_repo, revision):
        api = HfApi(endpoint=_endpoint())
        files = api.list_repo_files(hf_repo, revision=revision)
    return sorted(name for name in files if name.endswith(_SUFFIXES))


def _endpoint() -> str:
    # Read here, as huggingface_hub reads it once only, when it is imported.
    return os.environ.get('HF_ENDPOINT', constants.ENDPOINT).rstrip('/')


def _from_the_hub(what: str, hf_repo: str, revision: str) -> str:
    return f'{what} of {hf_repo} at revision {revision!r} from {_endpoint()}'


@contextlib.contextmanager
def _hub_errors(what: str, hf_repo: str, revision: str) -> Iterator[None]:
    """Say of every error of the Hub what was wanted, and what to do."""
    try:
        yield
    except _HUB_ERRORS as error:
        reason = str(error)
        if isinstance(error, LocalEntryNotFoundError) and error.__cause__:
            reason += f' {error.__cause__}'
        remedy = _remedy(error, f'{_endpoint()}/{hf_repo}')
        what = _from_the_hub(what, hf_repo, revision)
        raise _not_to_be_had(what, reason, remedy) from error


def _remedy(error: Exception, page: str) -> str:
    for kind, remedy in (
        (GatedRepoError, f'ask for access at {page}, then run `hf auth login`'),
        (RepositoryNotFoundError, 'correct hf_repo, or run `hf auth login`'),
        (RevisionNotFoundError, f'take one of {page}/commits'),
        (HFValidationError, "give hf_repo as 'owner/name'"),
    ):
        if isinstance(error, kind):
            return remedy
    response = getattr(error.__cause__ or error, 'response', None)
    if getattr(response, 'status_code', None) in (401, 403):
        return 'run `hf auth login`, or correct HF_TOKEN'
    if isinstance(error, LocalEntryNotFoundError):
        how = ' without HF_HUB_OFFLINE' if constants.HF_HUB_OFFLINE else ''
        return f'go online once{how}, or name a local file by checkpoint'
    return 'run it again'


def _not_to_be_had(what: str, reason: str, remedy: str) -> CheckpointError:
    line = ' '.join(reason.split()) or 'no reason given'
    return CheckpointError(f'cannot fetch {what} ({line}): {remedy}')


def _random_backbone(config: BackboneConfig) -> tuple[DynamicVis, dict[str, Any]]:
    if config.named_arch is None:
        raise SpecError(
            "arch='auto' cannot be told from the name "
            f"{config.checkpoint or config.ckpt_file}: give arch='b' or arch='l'"
        )
    warnings.warn(
        "weights='random': the backbone is untrained and its features mean nothing; "
        "use weights='pretrained' for the real ones",
        stacklevel=3,
    )
    model = _build(config, config.named_arch, {}, seed=RANDOM_SEED)
    return model, {'weights': 'random', 'seed': RANDOM_SEED}


def _pretrained_backbone(config: BackboneConfig) -> tuple[DynamicVis, dict[str, Any]]:
    source: dict[str, Any] = {'repository': None, 'file': None, 'revision': None}
    if config.checkpoint is not None:
        path = config.checkpoint
        source['file'] = path.name
    else:
        name, *others = _names_of(config)
        path = fetch_checkpoint(config.hf_repo, name, config.revision, *others)
        source['repository'] = config.hf_repo
        source['revision'], source['file'] = _place_in_cache(path)
    checkpoint = read_checkpoint(path, config.sha256)
    _check(config, checkpoint)
    try:
        model = _build(config, checkpoint.arch, checkpoint.settings)
    except (AttributeError, TypeError, ValueError) as error:
        # If it is not the file, this raises what is wrong with the configuration.
        _build(config, checkpoint.arch, {})
        raise CheckpointError(
            f'{path} was trained with settings of which no backbone can be built '
            f'({following(checkpoint.settings)}: {error}): give another file'
        ) from error
    keys = load_into(model, checkpoint)
    trained = checkpoint.img_size
    return model, {
        'weights': 'pretrained',
        **source,
        'sha256': checkpoint.sha256,
        'loaded_keys': keys['loaded'],
        'ignored_keys': keys['ignored'],
        'missing_keys': keys['missing'],
        'stored_dtypes': checkpoint.dtypes,
        'trained_img_size': None if trained is None else list(trained),
        'trained_settings': _as_json(checkpoint.settings),
        'training': checkpoint.meta,
    }


def _check(config: BackboneConfig, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that is another than the configuration says."""
    path = checkpoint.path
    if config.named_arch not in (None, checkpoint.arch):
        says = 'the name of the file' if config.arch == 'auto' else 'the configuration'
        raise CheckpointError(
            f'{path} holds arch {checkpoint.arch!r}, but {says} says '
            f'{config.named_arch!r}: give arch={checkpoint.arch!r}, or another file'
        )
    if checkpoint.mamba2 != config.mamba2:
        raise CheckpointError(
            f'{path} has mamba2={checkpoint.mamba2}, but mamba2={config.mamba2} is '
            f'asked for: give mamba2={checkpoint.mamba2}, or another file'
        )
    needs_gates = config.path_type.endswith('_gate')
    if checkpoint.path_type != (config.path_type if needs_gates else None):
        has = checkpoint.path_type or 'a path_type without gates'
        raise CheckpointError(
            f'{path} was made with {has}, but path_type={config.path_type!r} is asked '
            'for: give the path_type of the file, or another file'
        )
    trained = checkpoint.settings.get('path_type', config.path_type)
    if trained != config.path_type:
        warnings.warn(
            f'{path} was trained with path_type={trained!r}, but '
            f'path_type={config.path_type!r} is used: its features are other ones',
            stacklevel=4,
        )


def _build(
    config: BackboneConfig, arch: str, trained: Mapping[str, Any], seed: int = 0
) -> DynamicVis:
    """Build the backbone on the CPU; the state of global random generators is kept."""
    with torch.device('cpu'), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return DynamicVis(scan=config.scan, **config.model_arguments(arch, trained))


def _names_of(config: BackboneConfig) -> tuple[str, ...]:
    """Name the file to fetch; of arch l those that it probably has, the best first."""
    if config.arch == 'l' and config.ckpt_file == BackboneConfig.ckpt_file:
        best = DynamicVis_L_Weights.FMOW_EPOCH_150
        last = DynamicVis_L_Weights.FMOW_EPOCH_200
        return (*best.meta['ckpt_files'], *last.meta['ckpt_files'])
    return (config.ckpt_file,)


def _place_in_cache(path: Path) -> tuple[str, str]:
    """Return commit and name of a file in Hugging Face's cache."""
    for repository in path.parents:
        if repository.name.startswith('models--'):
            _, commit, *name = path.relative_to(repository).parts
            return commit, '/'.join(name)
    raise CheckpointError(f"{path} is not in Hugging Face's cache")


def _statistics(model: nn.Module) -> dict[str, float]:
    """Return count, mean, standard deviation, largest magnitude of the parameters."""
    tensors = [tensor.detach() for tensor in model.parameters()]
    wide = torch.float64
    count = sum(tensor.numel() for tensor in tensors)
    mean = sum(float(tensor.sum(dtype=wide)) for tensor in tensors) / count
    norms = [float(torch.linalg.vector_norm(tensor, dtype=wide)) for tensor in tensors]
    variance = sum(norm**2 for norm in norms) / count - mean**2
    return {
        'count': count,
        'mean': mean,
        'std': max(variance, 0.0) ** 0.5,
        'absmax': max(float(tensor.abs().max()) for tensor in tensors),
    }


def _as_json(value: Any) -> Any:
    """Give what JSON gives back for mappings and tuples."""
    return json.loads(json.dumps(value, default=dict))


class _HubWeights(WeightsEnum):
    """Weights whose file is an MMEngine checkpoint on Hugging Face."""

    def get_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Fetch the backbone's tensors; torch.hub's arguments have no effect here."""
        return _checkpoint_of(self).state_dict


def _checkpoint_of(weights: _HubWeights) -> Checkpoint:
    name, *others = weights.meta['ckpt_files']
    path = fetch_checkpoint(weights.meta['hf_repo'], name, 'main', *others)
    return read_checkpoint(path)


def _official(ckpt_file: str, model: str, *others: str) -> Weights:
    hf_repo = BackboneConfig.hf_repo
    return Weights(
        url=f'https://huggingface.co/{hf_repo}/resolve/main/{ckpt_file}',
        transforms=Preprocess(img_size=512),
        meta={
            'dataset': 'fMoW-rgb',
            'in_chans': 3,
            'img_size': 512,
            'bands': ('R', 'G', 'B'),
            'model': model,
            'publication': 'https://arxiv.org/abs/2503.16426',
            'repo': 'https://github.com/KyanChen/DynamicVis',
            # Labels of regions are learnt: supervised, for all the name of the key.
            'ssl_method': 'meta-embedding multi-instance learning',
            'license': 'Apache-2.0',
            'hf_repo': hf_repo,
            'ckpt_file': ckpt_file,
            'ckpt_files': (ckpt_file, *others),
            'name_is_inferred': bool(others),
        },
    )


class DynamicVis_B_Weights(_HubWeights):  # noqa: N801
    """Official weights of arch b, pretrained on fMoW-rgb at 512 pixels.

    As a member of TorchGeo's: ``transforms`` takes raw surface reflectance (0..10000),
    ``[3, H, W]`` or ``[B, 3, H, W]``, or a sample or batch with such an ``image``
    (:class:`~dynamicvis_geo.transforms.Preprocess`), ``meta`` has the keys of TorchGeo,
    and ``get_state_dict()`` the tensors, which the classification task loads.
    """

    FMOW_EPOCH_170 = _official(BackboneConfig.ckpt_file, 'DynamicVis-B')
    """The epoch of the best single-label F1; :class:`BackboneConfig`'s default."""
    FMOW_EPOCH_200 = _official(
        'pretrain_dynamicvis_b_bf16_mamba_epoch_200.pth', 'DynamicVis-B'
    )
    """The last epoch."""


_L_FOLDER = 'pretrain_dynamicvis_l_bf16_mamba'


class DynamicVis_L_Weights(_HubWeights):  # noqa: N801
    """Official weights of arch l, pretrained on fMoW-rgb at 512 pixels.

    The names of the files are inferred, from those of arch b and from configurations of
    the official code; nobody has seen them. Two spellings are tried in order, and if
    there is neither, the error lists what the repository holds: give such a name by
    ``load_backbone(BackboneConfig(ckpt_file=NAME))``. ``transforms`` is as of arch b.
    """

    FMOW_EPOCH_150 = _official(
        f'{_L_FOLDER}_best_single-label_f1-score_epoch_150.pth',
        'DynamicVis-L',
        f'{_L_FOLDER}/best_single-label_f1-score_epoch_150.pth',
    )
    """The epoch of the best single-label F1 score; the name of the file is inferred."""
    FMOW_EPOCH_200 = _official(
        f'{_L_FOLDER}_epoch_200.pth', 'DynamicVis-L', f'{_L_FOLDER}/epoch_200.pth'
    )
    """The last epoch; the name of the file is inferred."""


def dynamicvis_b(
    weights: DynamicVis_B_Weights | None = None, **kwargs: Any
) -> DynamicVis:
    """Build DynamicVis of arch b.

    Args:
        weights: Pretrained weights to load; None leaves the model untrained.
        **kwargs: Arguments of :class:`DynamicVis`, other than ``arch``.

    Returns:
        The model, not frozen.

    Raises:
        CheckpointError: If the weights cannot be fetched, or if keys are missing,
            unexpected, or of another shape.
    """
    return _with_weights('b', DynamicVis_B_Weights.verify(weights), kwargs)


def dynamicvis_l(
    weights: DynamicVis_L_Weights | None = None, **kwargs: Any
) -> DynamicVis:
    """Build DynamicVis of arch l.

    Args:
        weights: Pretrained weights to load; None leaves the model untrained.
        **kwargs: Arguments of :class:`DynamicVis`, other than ``arch``.

    Returns:
        The model, not frozen.

    Raises:
        CheckpointError: If the weights cannot be fetched, or if keys are missing,
            unexpected, or of another shape.
    """
    return _with_weights('l', DynamicVis_L_Weights.verify(weights), kwargs)


def _with_weights(
    arch: str, weights: _HubWeights | None, kwargs: Mapping[str, Any]
) -> DynamicVis:
    model = DynamicVis(arch=arch, **kwargs)
    if weights is not None:
        load_into(model, _checkpoint_of(weights))
    return model
