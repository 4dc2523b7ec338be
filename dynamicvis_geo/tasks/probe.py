"""A linear layer on frozen features: how much of a target they hold, linearly."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MetricCollection

from dynamicvis_geo.errors import CheckpointError, SpecError
from dynamicvis_geo.settings import check_comparable
from dynamicvis_geo.tasks.moments import Moments
from dynamicvis_geo.tasks.probe_inputs import (
    Optimizer,
    Standardize,
    Task,
    check_arguments,
    check_choice,
    find_key,
    flatten,
    once,
    provenances,
    unflatten,
)
from dynamicvis_geo.tasks.probe_metrics import class_metrics, score_metrics

#: Key of what this class adds to a Lightning checkpoint.
CHECKPOINT_KEY = 'dynamicvis_geo_probe'

_FEATURES = ('embedding', 'image')
_LABELS = ('label', 'mask')


class LinearProbe(LightningModule):
    """One linear layer from features to a target.

    On pooled features ``[B, D]`` it sees a vector a chip; on feature maps
    ``[B, D, h, w]`` the same layer sees every cell (a 1 x 1 convolution). Batches hold
    the features as ``embedding`` or ``image``, and labels as ``label`` or ``mask``:
    whole numbers ``[B]`` or ``[B, h, w]`` for classes; 0 and 1, ``[B, C]`` or
    ``[B, C, h, w]``, for several classes at once; numbers for regression. Cells whose
    features are not finite, or whose label is *ignore_index* or NaN, count nowhere.

    What is fitted on the data (z-scores, balanced weights, the mean and the spread of a
    regression's target) comes from one pass over the training data, before the first
    epoch, and is stored with the weights. So is the provenance of the features, which
    the datamodule says: other features are refused, with what differs.

    Attributes:
        classes: Names of the classes; none for regression.
        provenance: What made the features that the probe was fitted on.
    """

    mean: Tensor
    scale: Tensor
    class_weight: Tensor
    target_mean: Tensor
    target_scale: Tensor
    fitted: Tensor

    def __init__(
        self,
        task: Task,
        in_features: int,
        classes: Sequence[str] = (),
        standardize: Standardize = 'zscore',
        class_weights: Literal['balanced'] | Sequence[float] | None = None,
        lr: float = 1e-3,
        weight_decay: float = 1e-2,
        optimizer: Optimizer = 'adamw',
        ignore_index: int | None = None,
    ) -> None:
        """Make the layer, all weights 0.

        Args:
            task: 'binary', 'multiclass', 'multilabel' or 'regression'.
            in_features: D, the length of a vector.
            classes: Names of the classes, in the order of their numbers; 2 for binary,
                of which the second is the positive one; none for regression.
            standardize: 'zscore' by mean and standard deviation of the training data;
                'batchnorm' by those of each batch, and running ones afterwards; 'l2'
                scales each vector to length 1; 'none'.
            class_weights: Weight of each class in the loss (multilabel: of its
                positives); 'balanced' is n / (C n_c), or negatives / positives for
                multilabel, of the training data; None is 1.
            lr: Learning rate.
            weight_decay: Of the weights, not of the intercept.
            optimizer: 'adamw', or 'sgd' with momentum 0.9.
            ignore_index: Label of cells or samples to leave out.

        Raises:
            SpecError: If an argument has a value that cannot be used.
        """
        super().__init__()
        classes = tuple(classes)
        if not (class_weights is None or isinstance(class_weights, str)):
            class_weights = [float(weight) for weight in class_weights]
        check_arguments(
            task, in_features, classes, standardize, class_weights, lr, weight_decay
        )
        check_choice('optimizer', optimizer, Optimizer)
        # Plain lists and numbers: a checkpoint is then loaded without running code.
        self.save_hyperparameters(
            {
                'task': task,
                'in_features': in_features,
                'classes': list(classes),
                'standardize': standardize,
                'class_weights': class_weights,
                'lr': lr,
                'weight_decay': weight_decay,
                'optimizer': optimizer,
                'ignore_index': ignore_index,
            }
        )
        self.task, self.classes, self.standardize = task, classes, standardize
        self.in_features, self.ignore_index = in_features, ignore_index
        self.class_weights = class_weights
        self.lr, self.weight_decay, self.optimizer = lr, weight_decay, optimizer
        self.provenance: dict[str, Any] = {}
        self.linear = nn.Linear(in_features, max(1, len(classes)))
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        if standardize == 'batchnorm':
            self.batchnorm = nn.BatchNorm1d(in_features, affine=False)
        weights = class_weights if isinstance(class_weights, list) else None
        for name, value in (
            ('mean', torch.zeros(in_features)),
            ('scale', torch.ones(in_features)),
            ('class_weight', torch.tensor(weights or [1.0] * max(1, len(classes)))),
            ('target_mean', torch.zeros(1)),
            ('target_scale', torch.ones(1)),
            ('fitted', torch.tensor(not self._needs_a_pass)),
        ):
            self.register_buffer(name, value)
        self.metrics = nn.ModuleDict()
        for stage in ('val', 'test'):
            if task != 'regression':
                self.metrics[f'{stage}_classes'] = class_metrics(task, len(classes))
            if task != 'multiclass':
                self.metrics[f'{stage}_scores'] = score_metrics(task)

    @property
    def _needs_a_pass(self) -> bool:
        return (
            self.standardize == 'zscore'
            or self.class_weights == 'balanced'
            or self.task == 'regression'
        )

    def forward(self, features: Tensor) -> Tensor:
        """Map features ``[B, D]`` or ``[B, D, h, w]`` to logits, or to the target.

        Returns:
            ``[B, C]`` or ``[B, C, h, w]``; for regression C is 1, in units of the
            target.

        Raises:
            SpecError: If the features have another length, or nothing was fitted yet.
        """
        out = self._scores(self._rows(features))
        if self.task == 'regression':
            out = out * self.target_scale + self.target_mean
        return unflatten(out, features)

    @torch.no_grad()
    def probabilities(self, features: Tensor) -> Tensor:
        """Give the probability of each class, or the value of a regression.

        Args:
            features: ``[B, D]`` or ``[B, D, h, w]``.

        Returns:
            ``[B, C]`` or ``[B, C, h, w]``, C classes also for binary; for regression
            ``[B]`` or ``[B, h, w]``. NaN where features are not finite.
        """
        out: Tensor = self(features)
        known = features.isfinite().all(1, keepdim=True)
        out = out.masked_fill(~known, torch.nan)
        if self.task == 'regression':
            return out.squeeze(1)
        return out.sigmoid() if self.task == 'multilabel' else out.softmax(1)

    def fit_statistics(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Fit on the training data what is not learnt by gradients.

        The Trainer does it by itself, before the first epoch.

        Args:
            batches: Batches of training data, all of them once.

        Raises:
            SpecError: If they hold nothing to fit on, or the target is constant.
        """
        columns, targets = Moments(), Moments()
        counts = torch.zeros(max(1, len(self.classes)), dtype=torch.float64)
        for batch in batches:
            rows, labels = self._labelled(batch)
            columns.update(rows)
            if self.task == 'regression':
                targets.update(labels[:, None])
            elif self.task == 'multilabel':
                counts += labels.sum(0).cpu()
            else:
                counts += labels.bincount(minlength=len(counts)).cpu()
        if not columns.count:
            raise SpecError('the training data have no labelled sample: nothing to fit')
        mean, scale = columns.standard()
        if self.standardize == 'zscore':
            self.mean.copy_(mean)
            self.scale.copy_(scale)
        if self.task == 'regression':
            mean, scale = targets.standard()
            self.target_mean.copy_(mean)
            self.target_scale.copy_(scale)
        if self.class_weights == 'balanced':
            self.class_weight.copy_(self._balanced(counts, columns.count))
        self.fitted.fill_(True)

    def _balanced(self, counts: Tensor, total: int) -> Tensor:
        # A class that never occurs has no loss to weigh.
        positives = counts.clamp(min=1)
        if self.task == 'multilabel':
            return torch.where(counts > 0, (total - counts) / positives, 1.0)
        return total / (len(counts) * positives)

    def on_fit_start(self) -> None:
        """Take the provenance of the features, and pass once over the training data."""
        self.trainer.fit_loop.setup_data()
        loader = self.trainer.train_dataloader
        for made in self._provenances(loader):
            if self.provenance:
                self.check_features(made, 'the training features')
            self.provenance = made
        if not self.fitted:
            self.fit_statistics(once(loader))

    def on_test_start(self) -> None:
        """Refuse features that were made otherwise."""
        self._check_loaders(self.trainer.test_dataloaders)

    def on_predict_start(self) -> None:
        """Refuse features that were made otherwise."""
        self._check_loaders(self.trainer.predict_dataloaders)

    def check_features(
        self,
        provenance: Mapping[str, Any],
        what: str = 'these features',
        *,
        any_pooling: bool = False,
    ) -> None:
        """Refuse features that were made otherwise than those of the probe.

        Args:
            provenance: What :func:`~dynamicvis_geo.read_provenance` says of them.
            what: Names them in the error.
            any_pooling: Whether they may be pooled otherwise, or not at all.

        Raises:
            SpecError: If model, preprocessing or pooling differ, with a list of the
                differences.
        """
        check_comparable(self.provenance, provenance, what, any_pooling=any_pooling)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        rows, labels = self._labelled(batch)
        if self.standardize == 'batchnorm' and len(rows) < 2:
            raise SpecError(
                f'batch {batch_idx} has {len(rows)} labelled samples: batch '
                "normalisation needs two; use larger batches, or standardize='zscore'"
            )
        loss = self._loss(self._scores(rows), labels)
        self.log('train_loss', loss, batch_size=max(1, len(rows)))
        return loss

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Add a batch to ``val_loss`` and to the metrics."""
        self._evaluate(batch, 'val')

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Add a batch to ``test_loss`` and to the metrics."""
        self._evaluate(batch, 'test')

    def predict_step(
        self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Any]:
        """Replace the features of a batch by what the probe says of them.

        Returns:
            ``prediction``: int64 class numbers ``[B]`` or ``[B, h, w]`` (-1 where the
            features are not finite), bool ``[B, C]`` or ``[B, C, h, w]`` for
            multilabel, or float32 values for regression; ``probability`` ``[B, C]`` or
            ``[B, C, h, w]`` unless it is a regression; and the batch's other keys.
        """
        key = find_key(batch, _FEATURES)
        values = self.probabilities(batch[key])
        rest = {name: value for name, value in batch.items() if name != key}
        if self.task == 'regression':
            return {'prediction': values, **rest}
        if self.task == 'multilabel':
            return {'prediction': values > 0.5, 'probability': values, **rest}
        chosen = values.argmax(1)
        chosen[~values[:, 0].isfinite()] = -1
        return {'prediction': chosen, 'probability': values, **rest}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer; the intercept does not decay."""
        groups = [
            {'params': [self.linear.weight], 'weight_decay': self.weight_decay},
            {'params': [self.linear.bias], 'weight_decay': 0.0},
        ]
        if self.optimizer == 'sgd':
            return torch.optim.SGD(groups, lr=self.lr, momentum=0.9)
        return torch.optim.AdamW(groups, lr=self.lr)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write the provenance of the features."""
        checkpoint[CHECKPOINT_KEY] = {'features': self.provenance}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Read the provenance of the features."""
        self.provenance = checkpoint.get(CHECKPOINT_KEY, {}).get('features', {})

    def _rows(self, features: Tensor) -> Tensor:
        """Give vectors ``[n, D]``, one a sample or a cell."""
        if features.ndim not in (2, 4) or features.shape[1] != self.in_features:
            raise SpecError(
                f'features have shape {tuple(features.shape)}: this probe takes '
                f'[B, {self.in_features}] or [B, {self.in_features}, h, w]'
            )
        return flatten(features).float()

    def _scores(self, rows: Tensor) -> Tensor:
        if not self.fitted:
            raise SpecError(
                'the probe is not fitted: train it by a Trainer, load a checkpoint, or '
                'call fit_statistics'
            )
        if self.standardize == 'zscore':
            rows = (rows - self.mean) / self.scale
        elif self.standardize == 'l2':
            rows = F.normalize(rows, dim=1)
        elif self.standardize == 'batchnorm' and len(rows):
            rows = self.batchnorm(rows)
        scores: Tensor = self.linear(rows)
        return scores

    def _labelled(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Give the rows that count, and their labels."""
        features = batch[find_key(batch, _FEATURES)]
        rows, labels = self._rows(features), batch[find_key(batch, _LABELS)]
        cells = features.shape[:1] + features.shape[2:]
        if self.task == 'multilabel':
            expected = (cells[0], len(self.classes), *cells[1:])
        else:
            expected = tuple(cells)
            if labels.ndim == len(cells) + 1 and labels.shape[1] == 1:
                labels = labels.squeeze(1)
        if tuple(labels.shape) != expected:
            raise SpecError(
                f'labels have shape {tuple(labels.shape)}, but features of shape '
                f'{tuple(features.shape)} need labels {expected}'
            )
        labels = flatten(labels) if self.task == 'multilabel' else labels.reshape(-1)
        kept = rows.isfinite().all(1)
        valid = ~labels.isnan()
        if self.ignore_index is not None:
            valid &= labels != self.ignore_index
        kept &= valid.all(1) if valid.ndim == 2 else valid
        return rows[kept], self._checked(labels[kept])

    def _checked(self, labels: Tensor) -> Tensor:
        if self.task == 'regression':
            return labels.float()
        top = 1 if self.task == 'multilabel' else len(self.classes) - 1
        if len(labels) and (labels.min() < 0 or labels.max() > top):
            raise SpecError(
                f'labels run from {labels.min().item():g} to {labels.max().item():g}, '
                f'but a {self.task} probe of {len(self.classes)} classes takes 0 to '
                f'{top}: number them anew, or name the one to leave out by ignore_index'
            )
        return labels.float() if self.task == 'multilabel' else labels.long()

    def _loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        if not len(labels):
            return scores.sum() * 0
        if self.task == 'regression':
            wanted = (labels - self.target_mean) / self.target_scale
            return F.mse_loss(scores.squeeze(1), wanted)
        if self.task == 'multilabel':
            return F.binary_cross_entropy_with_logits(
                scores, labels, pos_weight=self.class_weight
            )
        return F.cross_entropy(scores, labels, self.class_weight)

    def _evaluate(self, batch: Mapping[str, Any], stage: str) -> None:
        rows, labels = self._labelled(batch)
        if not len(rows):
            return
        scores = self._scores(rows)
        self.log(f'{stage}_loss', self._loss(scores, labels), batch_size=len(rows))
        if self.task == 'regression':
            values = scores.squeeze(1) * self.target_scale + self.target_mean
        elif self.task == 'multilabel':
            values, labels = scores.sigmoid(), labels.long()
        else:
            values = scores.softmax(1)
        for kind in ('classes', 'scores'):
            if f'{stage}_{kind}' not in self.metrics:
                continue
            metrics = cast(MetricCollection, self.metrics[f'{stage}_{kind}'])
            if kind == 'scores' and self.task == 'binary':
                metrics.update(values[:, 1], labels)
            elif kind == 'scores' and self.task == 'multilabel':
                metrics.update(values.reshape(-1), labels.reshape(-1))
            else:
                metrics.update(values, labels)
            self.log_dict({f'{stage}_{k}': m for k, m in metrics.items()})

    def _provenances(self, loaders: Any) -> list[dict[str, Any]]:
        """Return what the datamodule or else the datasets say of their features."""
        made = getattr(getattr(self.trainer, 'datamodule', None), 'provenance', None)
        if made is not None:
            return [made]
        loaders = loaders if isinstance(loaders, list | tuple) else [loaders]
        datasets = [getattr(loader, 'dataset', None) for loader in loaders]
        return [made for dataset in datasets for made in provenances(dataset)]

    def _check_loaders(self, loaders: Any) -> None:
        for made in self._provenances(loaders):
            self.check_features(made, 'the features to predict from')


def load_probe(path: str | os.PathLike[str]) -> LinearProbe:
    """Load a fitted probe, without running code from its file.

    Args:
        path: A checkpoint that a Trainer wrote of a :class:`LinearProbe`.

    Returns:
        The probe on the CPU, in evaluation mode.

    Raises:
        CheckpointError: If there is no such file, or it is something else.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise CheckpointError(f'{path}: no such file; give the probe.ckpt of a probe')
    try:
        content = torch.load(path, map_location='cpu', weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f'{path}: not a readable checkpoint ({type(error).__name__}): '
            'give the probe.ckpt of a probe'
        ) from error
    if not isinstance(content, dict) or CHECKPOINT_KEY not in content:
        raise CheckpointError(
            f'{path}: no checkpoint of a LinearProbe: give the probe.ckpt of a probe'
        )
    probe = LinearProbe(**content['hyper_parameters'])
    probe.load_state_dict(content['state_dict'])
    probe.on_load_checkpoint(content)
    return probe.eval()
