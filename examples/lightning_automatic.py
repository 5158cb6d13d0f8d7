"""Lightning runs the step: accumulation, clipping, a schedule, and checkpoints by its Trainer."""

import tempfile

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader, TensorDataset

import kronewton as kn

images, labels = load_digits(return_X_y=True)
data = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))


class Reader(lightning.LightningModule):
    """Reads digits."""

    def __init__(self, **options):
        super().__init__()
        self.options = options
        self.model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        self.criterion = nn.CrossEntropyLoss()
        self.losses = []

    def training_step(self, batch, index):
        x, y = batch
        loss = self.criterion(self.model(x), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        optimizer = kn.KFAC(self.model, self.criterion, **self.options)
        return [optimizer], [LinearLR(optimizer, 1.0, 0.3, 6)]  # stepped after each epoch


def train(folder, epochs=6, parts=2, clip=5.0, resume=None, options=None, **arguments):
    """The module when it is trained, and its Trainer."""
    torch.manual_seed(0)
    reader = Reader(**(options or {}))
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accumulate_grad_batches=parts,
        gradient_clip_val=clip,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )
    trainer.fit(reader, DataLoader(data, 256 // parts, drop_last=True), ckpt_path=resume)
    return reader, trainer


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        reader, _ = train(folder)
        _, half = train(folder, epochs=3)
        half.save_checkpoint(f"{folder}/half.ckpt")
        resumed, _ = train(folder, resume=f"{folder}/half.ckpt")
    same = all(map(torch.equal, reader.parameters(), resumed.parameters()))
    print(f"the loss fell from {reader.losses[0]:.3f} to {reader.losses[-1]:.5f}")
    print(f"the second half again, from a checkpoint: {same and 'the same weights'}")
