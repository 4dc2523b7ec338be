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
from dynamicvis_geo.tasks.probe_inputs import (
    Optimizer,
    Standardize,
    check_arguments,
    check_classes,
    copy_moments,
    find_key,
    flat,
    label_rows,
    once,
    provenances,
)
from dynamicvis_geo.tasks.probe_scores import (
    IGNORED,
    activated,
    probe_loss,
    probe_metrics,
)

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

    It logs ``train_loss``, ``val_loss`` and ``test_loss``, and for validation and test
    the metrics of torchmetrics, such as ``val_accuracy_micro``, under the names of
    :mod:`~dynamicvis_geo.evaluation.metrics`; all of them, but ``train_loss``, over the
    rows of all processes.

    Attributes:
        classes: Names of the classes; none for regression.
        provenance: Provenance of the features that the probe was fitted on.
    """

    mean: Tensor
    scale: Tensor
    class_weight: Tensor
    target_mean: Tensor
    target_scale: Tensor
    fitted: Tensor

    def __init__(
        self,
        task: Literal['binary', 'multiclass', 'multilabel', 'regression'],
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
        # Plain lists and numbers: a checkpoint is then loaded without running code.
        classes = list(classes)
        if not (class_weights is None or isinstance(class_weights, str)):
            class_weights = [float(weight) for weight in class_weights]
        check_arguments(
            task,
            in_features,
            classes,
            standardize,
            class_weights,
            lr,
            weight_decay,
            optimizer,
        )
        self.save_hyperparameters()
        self.task, self.classes, self.standardize = task, tuple(classes), standardize
        self.in_features, self.ignore_index = in_features, ignore_index
        self.class_weights = class_weights
        self.lr, self.weight_decay, self.optimizer = lr, weight_decay, optimizer
        self.provenance: dict[str, Any] = {}
        outputs = max(1, len(classes))
        self.linear = nn.Linear(in_features, outputs)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        if standardize == 'batchnorm':
            self.batchnorm = nn.BatchNorm1d(in_features, affine=False)
        needs_a_pass = (
            standardize == 'zscore'
            or class_weights == 'balanced'
            or task == 'regression'
        )
        weights = class_weights if isinstance(class_weights, list) else [1.0] * outputs
        for name, buffer in (
            ('mean', torch.zeros(in_features)),
            ('scale', torch.ones(in_features)),
            ('class_weight', torch.tensor(weights)),
            ('target_mean', torch.zeros(1)),
            ('target_scale', torch.ones(1)),
            ('fitted', torch.tensor(not needs_a_pass)),
        ):
            self.register_buffer(name, buffer)
        # Of each stage, the loss of all rows so far, and their number.
        self._sums = {stage: torch.zeros(2) for stage in ('val', 'test')}
        self.metrics = nn.ModuleDict(
            {stage: probe_metrics(task, len(classes)) for stage in ('val', 'test')}
        )

    def forward(self, features: Tensor) -> Tensor:
        """Map features ``[B, D]`` or ``[B, D, h, w]`` to logits, or to the target.

        Args:
            features: ``[B, D]`` or ``[B, D, h, w]``.

        Returns:
            ``[B, C]`` or ``[B, C, h, w]``; for regression C is 1, in units of the
            target.

        Raises:
            SpecError: If the features have another length, or nothing was fitted yet.
        """
        out = self._scores(self._rows(features))
        if self.task == 'regression':
            out = out * self.target_scale + self.target_mean
        if features.ndim == 2:
            return out
        batch, _, height, width = features.shape
        return out.reshape(batch, height, width, -1).movedim(-1, 1)

    @torch.no_grad()
    def probabilities(self, features: Tensor) -> Tensor:
        """Give the probability of each class, or the value of a regression.

        Args:
            features: ``[B, D]`` or ``[B, D, h, w]``.

        Returns:
            ``[B, C]`` or ``[B, C, h, w]``, C classes also for binary; for regression
            ``[B]`` or ``[B, h, w]``. NaN where features are not finite.

        Raises:
            SpecError: As :meth:`forward`.
        """
        out: Tensor = self(features)
        known = features.isfinite().all(1, keepdim=True)
        return activated(self.task, out.masked_fill(~known, torch.nan))

    def fit_statistics(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Fit on the training data what is not learnt by gradients.

        The Trainer does it by itself, before the first epoch.

        Args:
            batches: Batches of training data, all of them once.

        Raises:
            SpecError: If they hold nothing to fit on.
        """
        # Features are extracted without scikit-learn, which takes long to import.
        from sklearn.preprocessing import StandardScaler

        columns, targets = StandardScaler(), StandardScaler()
        for batch in batches:
            rows, labels = (part.cpu() for part in self._labelled(batch))
            if not len(rows):
                continue
            columns.partial_fit(rows.double().numpy())
            if self.task in ('binary', 'multiclass'):
                labels = F.one_hot(labels, len(self.classes))
            targets.partial_fit(labels.double().reshape(len(rows), -1).numpy())
        if not hasattr(columns, 'mean_'):
            raise SpecError('the training data have no labelled sample: nothing to fit')
        if self.standardize == 'zscore':
            copy_moments(columns, self.mean, self.scale)
        if self.task == 'regression':
            copy_moments(targets, self.target_mean, self.target_scale)
        if self.class_weights == 'balanced':
            shares = torch.from_numpy(targets.mean_)
            if self.task == 'multilabel':
                weights = (1 - shares) / shares
            else:
                weights = 1 / (len(shares) * shares)
            # A class that never occurs has no loss to weigh.
            self.class_weight.copy_(torch.where(shares > 0, weights, 1.0))
        self.fitted.fill_(True)

    def on_fit_start(self) -> None:
        """Take the provenance of the features, and pass once over the training data."""
        self.trainer.fit_loop.setup_data()
        loader = self.trainer.train_dataloader
        for made in provenances(self.trainer, loader):
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
            provenance: Theirs, as :func:`~dynamicvis_geo.read_provenance` gives it.
            what: Names them in the error.
            any_pooling: Let them be pooled otherwise, or not at all.

        Raises:
            SpecError: If model, preprocessing or pooling differ, with a list of the
                differences.
        """
        check_comparable(self.provenance, provenance, what, any_pooling=any_pooling)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Return the loss of a batch, and log it as ``train_loss``.

        Args:
            batch: Features and labels.
            batch_idx: Position of the batch.

        Returns:
            The loss, a scalar.

        Raises:
            SpecError: If the batch lacks features or labels, they do not fit the probe,
                or batch normalisation has fewer than two samples.
        """
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
        """Add a batch to ``val_loss`` and to the metrics.

        Args:
            batch: Features and labels.
            batch_idx: Position of the batch.
        """
        self._evaluate(batch, 'val')

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Add a batch to ``test_loss`` and to the metrics.

        Args:
            batch: Features and labels.
            batch_idx: Position of the batch.
        """
        self._evaluate(batch, 'test')

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the validation data."""
        self._log_metrics('val')

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the test data."""
        self._log_metrics('test')

    def predict_step(
        self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Any]:
        """Replace the features of a batch by the probe's predictions.

        Args:
            batch: Holds the features.
            batch_idx: Position of the batch.
            dataloader_idx: Position of the DataLoader.

        Returns:
            ``prediction``: int64 class numbers ``[B]`` or ``[B, h, w]`` (-1 where the
            features are not finite), bool ``[B, C]`` or ``[B, C, h, w]`` for
            multilabel, or float32 values for regression; ``probability`` ``[B, C]`` or
            ``[B, C, h, w]`` unless it is a regression; and the batch's other keys.

        Raises:
            SpecError: If the batch has no features, or they are of another length.
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
        """Make the optimizer; the intercept does not decay.

        Returns:
            AdamW, or SGD with momentum 0.9.
        """
        groups = [
            {'params': [self.linear.weight], 'weight_decay': self.weight_decay},
            {'params': [self.linear.bias], 'weight_decay': 0.0},
        ]
        if self.optimizer == 'sgd':
            return torch.optim.SGD(groups, lr=self.lr, momentum=0.9)
        return torch.optim.AdamW(groups, lr=self.lr)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write the provenance of the features.

        Args:
            checkpoint: What a Trainer is about to save.
        """
        checkpoint[CHECKPOINT_KEY] = {'features': self.provenance}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Read the provenance of the features.

        Args:
            checkpoint: What a Trainer has read.
        """
        self.provenance = checkpoint.get(CHECKPOINT_KEY, {}).get('features', {})

    def _rows(self, features: Tensor) -> Tensor:
        """Give vectors float32 ``[n, D]``, one a sample or a cell."""
        if features.ndim not in (2, 4) or features.shape[1] != self.in_features:
            raise SpecError(
                f'features have shape {tuple(features.shape)}: this probe takes '
                f'[B, {self.in_features}] or [B, {self.in_features}, h, w]'
            )
        return flat(features).float()

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
        labels = label_rows(labels, features, self.task, len(self.classes))
        several = self.task == 'multilabel'
        valid = ~labels.isnan()
        if self.ignore_index is not None:
            valid &= labels != self.ignore_index
        kept = rows.isfinite().all(1) & (valid.all(1) if several else valid)
        rows, labels = rows[kept], labels[kept]
        if self.task == 'regression':
            return rows, labels.float()
        check_classes(labels, self.task, len(self.classes))
        return rows, labels.float() if several else labels.long()

    def _loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        if not len(labels):
            return scores.sum() * 0
        if self.task == 'regression':
            labels = (labels - self.target_mean) / self.target_scale
        return probe_loss(self.task, scores, labels, self.class_weight)

    def _evaluate(self, batch: Mapping[str, Any], stage: str) -> None:
        rows, labels = self._labelled(batch)
        scores = self._scores(rows)
        loss = self._loss(scores, labels).detach()
        self._sums[stage] += torch.stack([loss, torch.ones_like(loss)]).cpu() * len(
            rows
        )
        if self.task == 'regression':
            scores = scores * self.target_scale + self.target_mean
        else:
            labels = labels.long()
            if not len(labels):
                # A metric that has seen nothing has nothing to gather, while other
                # processes wait for it; and it cannot see an empty batch.
                shape = (1, scores.shape[1])
                scores = scores.new_zeros(shape)
                several = self.task == 'multilabel'
                labels = labels.new_full(shape if several else (1,), IGNORED)
        cast(MetricCollection, self.metrics[stage]).update(
            activated(self.task, scores), labels
        )

    def _log_metrics(self, stage: str) -> None:
        metrics = cast(MetricCollection, self.metrics[stage])
        sums = self._sums[stage].to(self.device)
        self._sums[stage] = torch.zeros(2)
        loss, count = self.trainer.strategy.reduce(sums, reduce_op='sum')
        if count:
            # Of all processes, each of which logs the same.
            self.log(f'{stage}_loss', loss / count, sync_dist=True)
            for name, value in metrics.compute().items():
                # Of binary, the second class alone.
                one = value[1] if value.ndim else value
                self.log(f'{stage}_{name}', one, sync_dist=True)
        metrics.reset()

    def _check_loaders(self, loaders: Any) -> None:
        for made in provenances(self.trainer, loaders):
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
