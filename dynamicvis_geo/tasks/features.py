"""Feature extraction under a Lightning Trainer."""

import hashlib
from typing import Any, Literal, Self, get_args

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.models.config import BackboneConfig
from dynamicvis_geo.models.dynamicvis import DynamicVis
from dynamicvis_geo.models.graphs import GraphedForward
from dynamicvis_geo.models.weights import load_backbone
from dynamicvis_geo.transforms import Preprocess

#: A vector each chip, or its feature map.
OutputMode = Literal['pooled', 'grid']
Pooling = Literal['mean', 'max']


class FeatureExtraction(LightningModule):
    """The features of a frozen backbone, chip by chip.

    Args:
        backbone: what to load, or any module that maps ``[B, 3, h, w]`` normalised
            images to feature maps (a tensor, or a tuple whose last entry counts).
            Images are resized to its attribute ``img_size``, if it has one; its
            attribute ``provenance``, a dict, says where it comes from; its method
            ``numerics``, given a device, how it computes there, as a dict.
        output: 'pooled' gives one vector a chip, 'grid' the map itself.
        pooling: 'mean' or 'max' over the cells of the map.
        input_range: raw values that become black and white, see
            :class:`~dynamicvis_geo.transforms.Preprocess`.

    Raises:
        SpecError: if an argument has a value that cannot be used.
        CheckpointError: if the weights cannot be loaded.
    """

    def __init__(
        self,
        backbone: BackboneConfig | nn.Module = BackboneConfig(),  # noqa: B008 - frozen
        output: OutputMode = 'pooled',
        pooling: Pooling = 'mean',
        input_range: tuple[float, float] = (0.0, 10000.0),
    ) -> None:
        super().__init__()
        for name, value, choices in (
            ('output', output, get_args(OutputMode)),
            ('pooling', pooling, get_args(Pooling)),
        ):
            if value not in choices:
                raise SpecError(
                    f'{name}={value!r} is unknown: choose one of {", ".join(choices)}'
                )
        self.output, self.pooling = output, pooling
        if isinstance(backbone, nn.Module):
            self.backbone, described = backbone, _describe(backbone)
        else:
            self.backbone, described = load_backbone(backbone)
        self.preprocess = Preprocess(
            getattr(self.backbone, 'img_size', None), input_range
        )
        self.requires_grad_(False)
        self.eval()
        self._graphs = GraphedForward(self._last_map, self.parameters)
        # In a run with more processes than chips, some get none.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self._made: dict[str, Any] = {
            'backbone': described,
            'preprocessing': self.preprocess.provenance,
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
        channels: tuple[int, ...] = getattr(self.backbone, 'feature_channels', ())
        return channels[-1] if channels else None

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
        """Give the last feature map of images that are preprocessed already.

        Args:
            x: normalised images, ``[B, 3, h, w]``.

        Returns:
            float32 ``[B, D, h, w]``; ``[B, D]`` if the backbone gives vectors.
        """
        if isinstance(self.backbone, DynamicVis) and self.backbone.can_fuse(x):
            return self._graphs(x)
        return self._last_map(x)

    def _last_map(self, x: Tensor) -> Tensor:
        maps = self.backbone(x)
        last: Tensor = maps[-1] if isinstance(maps, tuple | list) else maps
        return last.float()

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
