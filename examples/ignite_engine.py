"""Ignite: its engine for supervised training, with parts, clipping and checkpoints."""

import tempfile
from pathlib import Path

import torch
from ignite.engine import Events, create_supervised_trainer
from ignite.handlers import Checkpoint, DiskSaver, PiecewiseLinear
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kronewton as kn

EPOCHS = 6
images, labels = load_digits(return_X_y=True)
data = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))


def train(folder, epochs=EPOCHS, parts=2, resume=None, **options):
    """Losses of the parts, and the model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    criterion = nn.CrossEntropyLoss()
    optimizer = kn.KFAC(model, criterion, **options)
    loader = DataLoader(data, 256 // parts, drop_last=True)
    trainer = create_supervised_trainer(
        model, optimizer, criterion, gradient_accumulation_steps=parts
    )
    end = EPOCHS * len(loader)
    schedule = PiecewiseLinear(optimizer, "lr", [(0, 1.0), (end, 0.3)])
    trainer.add_event_handler(Events.ITERATION_STARTED, schedule)
    losses = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda: losses.append(trainer.state.output)
    )
    saved = {"model": model, "optimizer": optimizer, "schedule": schedule, "trainer": trainer}
    if resume:
        Checkpoint.load_objects(saved, torch.load(resume, weights_only=True))
    keep = Checkpoint(saved, DiskSaver(str(folder), require_empty=False), n_saved=None)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, keep)
    trainer.run(loader, max_epochs=epochs)
    return losses, model


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        losses, model = train(folder)
        half = sorted(Path(folder).glob("*.pt"), key=lambda path: int(path.stem.split("_")[-1]))[2]
        again, resumed = train(folder, resume=half)
    same = all(map(torch.equal, model.parameters(), resumed.parameters()))
    print(f"the loss fell from {losses[0]:.3f} to {losses[-1]:.5f}")
    print(f"the last {len(again)} parts again, from {half.name}: {same and 'the same weights'}")
