"""Accelerate: a plain loop on whatever device there is, with parts, clipping and checkpoints."""

import tempfile

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader, TensorDataset

import kronewton as kn

EPOCHS = 6
images, labels = load_digits(return_X_y=True)
data = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))


def train(folder, epochs=EPOCHS, resume=False, save_at=EPOCHS // 2, parts=2, clip=5.0,
          precision="no", **options):  # fmt: skip
    """Mean losses of the epochs, and the model."""
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=parts, mixed_precision=precision)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    criterion = nn.CrossEntropyLoss()
    optimizer = kn.KFAC(model, criterion, **options)  # of the model as it is before prepare()
    schedule = LinearLR(optimizer, 1.0, 0.3, EPOCHS)
    loader = DataLoader(data, 256 // parts, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator.register_for_checkpointing(schedule)
    if resume:
        accelerator.load_state(folder)

    means = []
    for epoch in range(schedule.last_epoch, epochs):
        losses = []
        for x, y in loader:
            with accelerator.accumulate(model):  # divides the loss by the number of parts
                loss = criterion(model(x), y)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
        schedule.step()
        means.append(torch.stack(losses).mean().item())
        if epoch + 1 == save_at:
            accelerator.save_state(folder)
    return means, model


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        losses, model = train(folder)
        again, resumed = train(folder, resume=True)
    same = all(map(torch.equal, model.parameters(), resumed.parameters()))
    print(f"the loss fell from {losses[0]:.3f} to {losses[-1]:.5f} in {len(losses)} epochs")
    print(f"the last {len(again)} again, from the checkpoint: {same and 'the same weights'}")
