"""Lightning with manual optimisation: the step is yours, and may be given a closure."""

import tempfile

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kronewton as kn

images, labels = load_digits(return_X_y=True)
data = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))


class Reader(lightning.LightningModule):
    """Reads digits, and makes its own steps."""

    def __init__(self, clip=5.0, closure=False, **options):
        super().__init__()
        self.automatic_optimization = False
        self.clip, self.closure, self.options = clip, closure, options
        self.model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        self.criterion = nn.CrossEntropyLoss()
        self.losses = []

    def training_step(self, batch, index):
        x, y = batch
        optimizer = self.optimizers()

        def gradients():
            optimizer.zero_grad()
            loss = self.criterion(self.model(x), y)
            self.manual_backward(loss)
            self.clip_gradients(optimizer, self.clip, "norm")
            return loss

        if self.closure:
            loss = optimizer.step(gradients)
        else:
            loss = gradients()
            optimizer.step()
        self.losses.append(loss.item())

    def configure_optimizers(self):
        return kn.KFAC(self.model, self.criterion, **self.options)


def train(folder, epochs=6, resume=None, module=None, **arguments):
    """The module when it is trained, and its Trainer."""
    torch.manual_seed(0)
    reader = Reader(**(module or {}))
    trainer = lightning.Trainer(
        max_epochs=epochs,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )
    trainer.fit(reader, DataLoader(data, 256, drop_last=True), ckpt_path=resume)
    return reader, trainer


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        reader, _ = train(folder)
        other, _ = train(folder, module={"closure": True})
    same = all(map(torch.equal, reader.parameters(), other.parameters()))
    print(f"the loss fell from {reader.losses[0]:.3f} to {reader.losses[-1]:.5f}")
    print(f"with a closure: {same and 'the same weights'}")
