"""Batches on their way to a GPU."""

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor


class CopiesAhead(LightningDataModule):
    """Copies page-locked batches to a GPU while it computes the one before.

    Lightning copies on the stream that computes, where a copy waits for all that was
    asked for earlier.
    """

    _copying: torch.cuda.Stream | None = None

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Copy a batch, on a stream of its own if the device is a GPU.

        Args:
            batch: Tensors, and anything that holds them.
            device: Of the model.
            dataloader_idx: Position of the DataLoader.

        Returns:
            The batch on the device.
        """
        if device.type != 'cuda':
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        if self._copying is None:
            self._copying = torch.cuda.Stream(device)
        computing = torch.cuda.current_stream(device)
        with torch.cuda.stream(self._copying):
            moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
        computing.wait_stream(self._copying)
        apply_to_collection(moved, Tensor, lambda t: t.record_stream(computing))
        return moved
