"""Feature extraction under a Lightning Trainer."""

import hashlib
from typing import Any, Literal, Self, get_args

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.models.config import BackboneConfig
from dynamicvis_geo.models.dynamicvis import DynamicVis, map_shapes
from dynamicvis_geo.models.graphs import GraphedForward
from dynamicvis_geo.models.weights import load_backbone
from dynamicvis_geo.transforms import Preprocess

#: A vector each chip, or its feature map.
OutputMode = Literal['pooled', 'grid']
Pooling = Literal['mean', 'max']
#: Stages of the backbone; their cells are 4, 8, 16 and 32 pixels of its input wide.
STAGES = (0, 1, 2, 3)


class FeatureExtraction(LightningModule):
    """The features of a frozen backbone, chip by chip.

    Args:
        backbone: what to load, or any module that maps ``[B, 3, h, w]`` normalised
            images to feature maps: a tensor, or a tuple of them, of the finest first.
            Images are resized to its attribute ``img_size``, if it has one; its
            attribute ``provenance``, a dict, says where it comes from; its method
            ``numerics``, given a device, how it computes there, as a dict.
        output: 'pooled' gives one vector a chip, 'grid' the map itself.
        pooling: 'mean' or 'max' over the cells of the map.
        input_range: raw values that become black and white, see
            :class:`~dynamicvis_geo.transforms.Preprocess`.
        stage: which map of the backbone, 0 to 3. DynamicVis gives those of strides 4,
            8, 16 and 32, and later stages do not run. Of the maps of another module, 3
            is the last one, 2 the one before, and so on.

    Raises:
        SpecError: if an argument has a value that cannot be used, or the backbone has
            no such stage.
        CheckpointError: if the weights cannot be loaded.
    """

    def __init__(
        self,
        backbone: BackboneConfig | nn.Module = BackboneConfig(),  # noqa: B008 - frozen
        output: OutputMode = 'pooled',
        pooling: Pooling = 'mean',
        input_range: tuple[float, float] = (0.0, 10000.0),
        stage: int = 3,
    ) -> None:
        super().__init__()
        for name, value, choices in (
            ('output', output, get_args(OutputMode)),
            ('pooling', pooling, get_args(Pooling)),
            ('stage', stage, STAGES),
        ):
            if value not in choices or isinstance(value, bool):
                raise SpecError(
                    f'{name}={value!r} is unknown: choose one of '
                    f'{", ".join(map(str, choices))}'
                )
        self.output, self.pooling, self.stage = output, pooling, int(stage)
        if isinstance(backbone, nn.Module):
            self.backbone = backbone
            described = _describe(_native(backbone) or backbone)
        else:
            self.backbone, described = load_backbone(
                backbone, **stages_to_load(backbone)
            )
        native, settings = _native(self.backbone), described.get('settings')
        is_ours = native or described.get('implementation') == 'upstream'
        self._shapes: tuple[tuple[int, int, int], ...] = ()
        if settings is not None and is_ours:
            self._shapes = map_shapes(settings)
            self._check_count(len(self._shapes))
            # Not those that the model was built for: the stage is what it is asked for.
            settings = {**settings, 'out_indices': [self.stage]}
            described = {**described, 'settings': settings}
        built = (3,) if native is None else native.out_indices
        if built != (3,) and stage not in built:
            raise SpecError(
                f'stage={stage}: the backbone was built for others, out_indices='
                f'{built}: give one of these, or build it without out_indices'
            )
        self.preprocess = Preprocess(
            getattr(self.backbone, 'img_size', None), input_range
        )
        self.requires_grad_(False)
        self.eval()
        self._graphs = GraphedForward(self._map, self.parameters)
        # In a run with more processes than chips, some get none.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self._made: dict[str, Any] = {
            'backbone': described,
            'preprocessing': self.preprocess.provenance,
            'stage': self.stage,
            'output': output,
            'pooling': f'featmap_{pooling}' if output == 'pooled' else None,
        }

    @property
    def provenance(self) -> dict[str, Any]:
        """The making of the features, ready for JSON.

        Under a Trainer, ``numerics`` tells its precision, and what the backbone says of
        the device that it will run on.
        """
        trainer = self._trainer
        numerics = {
            'precision': '32-true' if trainer is None else str(trainer.precision),
            'kernel': None,
            'tf32': None,
        }
        told: Any = getattr(self.backbone, 'numerics', None)
        if callable(told):
            device = self.device if trainer is None else trainer.strategy.root_device
            numerics |= told(device)
        return {**self._made, 'numerics': numerics}

    @property
    def embedding_dim(self) -> int | None:
        """Channels of the features, where the backbone declares its own."""
        if self.feature_shape is not None:
            return self.feature_shape[0]
        channels: tuple[int, ...] = getattr(self.backbone, 'feature_channels', ())
        return channels[self._index] if len(channels) >= -self._index else None

    @property
    def feature_shape(self) -> tuple[int, int, int] | None:
        """Channels, height and width of a feature map, where they are known."""
        return self._shapes[self._index] if self._shapes else None

    @property
    def _index(self) -> int:
        """The map of the stage, counted from the last one of all stages."""
        return self.stage - len(STAGES)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: the features are of a frozen model.

        Args:
            mode: Not used.

        Returns:
            The module.
        """
        return super().train(False)

    # Not inference_mode: its tensors could not enter the training of a probe.
    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """Give the features of raw images.

        Args:
            image: raw reflectance, ``[B, 3, H, W]``, bands red, green, blue.

        Returns:
            float32 ``[B, D]`` if pooled, ``[B, D, h, w]`` if a grid.

        Raises:
            SpecError: if there are not 3 bands, or the dtype is a 16-bit float.
        """
        return self.reduce(self.features(self.preprocess(image)))

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """Give the feature maps of images that are preprocessed already.

        Args:
            x: normalised images, ``[B, 3, h, w]``.

        Returns:
            float32 ``[B, D, h, w]``; ``[B, D]`` if the backbone gives vectors.

        Raises:
            SpecError: if the backbone gives no map of the stage.
        """
        if isinstance(self.backbone, DynamicVis) and self.backbone.can_fuse(x):
            return self._graphs(x)
        return self._map(x)

    def _map(self, x: Tensor) -> Tensor:
        native = _native(self.backbone)
        if native is not None:
            # Only a stage that the model would not end with has to be asked for.
            ends = native.out_indices[-1] == self.stage
            asked = {} if ends else {'out_indices': (self.stage,)}
            last: Tensor = self.backbone(x, **asked)[-1]
            return last.float()
        maps = self.backbone(x)
        if not isinstance(maps, tuple | list):
            maps = [maps]
        self._check_count(len(maps))
        chosen: Tensor = maps[self._index]
        return chosen.float()

    def _check_count(self, maps: int) -> None:
        """Refuse a stage that a backbone of so many maps does not have."""
        if maps < -self._index:
            has = 'one map, stage 3' if maps == 1 else f'stages {4 - maps} to 3'
            raise SpecError(
                f'stage={self.stage}: the backbone gives {has}: choose one of these, '
                'or a backbone that gives more maps'
            )

    def reduce(self, features: Tensor) -> Tensor:
        """Pool feature maps, or leave them as they are: see ``output``.

        Args:
            features: ``[B, D, h, w]``; ``[B, D]`` counts as maps of one cell.

        Returns:
            ``[B, D]`` if pooled, ``[B, D, h, w]`` if a grid.
        """
        if features.ndim == 2:
            features = features[..., None, None]
        if self.output == 'grid':
            return features
        if self.pooling == 'mean':
            return features.mean((2, 3))
        return features.amax((2, 3))

    def predict_step(
        self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Any]:
        """Replace the image of a batch by its features.

        Args:
            batch: holds ``image``, raw reflectance ``[B, 3, H, W]``.
            batch_idx: position of the batch.
            dataloader_idx: position of the DataLoader.

        Returns:
            ``embedding``, float32 ``[B, D]`` or ``[B, D, h, w]``, and all other keys of
            the batch as they came; of a batch whose chips were all skipped, which holds
            ``failures`` or nothing, just that.

        Raises:
            SpecError: if the batch has no image, or not one of 3 bands; or if it has an
                ``embedding`` of its own.
        """
        if not batch.keys() - {'failures'}:
            return batch
        if 'image' not in batch:
            raise SpecError(
                f"the batch has no 'image', only {', '.join(sorted(batch))}: give "
                'samples of a dataset of images, such as a RasterDataset'
            )
        if 'embedding' in batch:
            raise SpecError(
                "the batch has an 'embedding' already, which that of its image would "
                'replace: rename or drop that key of the samples, in the transforms of '
                'the dataset'
            )
        rest = {key: value for key, value in batch.items() if key != 'image'}
        return {'embedding': self(batch['image']), **rest}


def stages_to_load(config: BackboneConfig) -> dict[str, Any]:
    """Say with what :func:`load_backbone` gives a backbone that has any stage.

    Ours is asked for a stage at each call; the official code has to give them all.

    Args:
        config: what to load.

    Returns:
        Further arguments of :func:`load_backbone`.
    """
    return {'out_indices': STAGES} if config.implementation == 'upstream' else {}


def _native(backbone: nn.Module) -> DynamicVis | None:
    """Return the DynamicVis that a backbone is, or that torch.compile has wrapped."""
    model = getattr(backbone, '_orig_mod', backbone)
    return model if isinstance(model, DynamicVis) else None


def _describe(backbone: nn.Module) -> dict[str, Any]:
    known: dict[str, Any] | None = getattr(backbone, 'provenance', None)
    described = known or {
        'implementation': f'{type(backbone).__module__}.{type(backbone).__qualname__}',
        'parameters': sum(parameter.numel() for parameter in backbone.parameters()),
    }
    if isinstance(backbone, DynamicVis):
        described = described | {'settings': backbone.settings}
        if known is None:
            described['tensors'] = _sha256(backbone)
    return described


def _sha256(model: DynamicVis) -> str:
    """Digest names and values of all weights: nothing else tells which they are."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
