"""A plain loop: parts of a batch, clipping, a schedule, and a checkpoint to go on from."""

import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import LinearLR

import kronewton as kn

STEPS = 60
images, labels = load_digits(return_X_y=True)
X, Y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)


def batch(step, size=256):
    """The batch of a step is drawn from the step's number: a resumed run sees the same ones."""
    index = torch.randint(len(X), (size,), generator=torch.Generator().manual_seed(step))
    return X[index], Y[index]


def train(checkpoint, steps=STEPS, parts=2, clip=5.0, resume=False, save_at=STEPS // 2, **options):
    """Losses of the steps, and the model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    criterion = nn.CrossEntropyLoss()
    optimizer = kn.KFAC(model, criterion, **options)
    schedule = LinearLR(optimizer, 1.0, 0.3, STEPS)  # multiplies the automatic learning rate
    saved, first = [model, optimizer, schedule], 0
    if resume:
        states = torch.load(checkpoint, weights_only=True)
        first = states.pop("step")
        for one, state in zip(saved, states.values(), strict=True):
            one.load_state_dict(state)

    losses = []
    for step in range(first, steps):
        optimizer.zero_grad()
        x, y = batch(step)
        losses.append(0.0)
        for x_part, y_part in zip(x.chunk(parts), y.chunk(parts), strict=True):
            loss = criterion(model(x_part), y_part) * len(x_part) / len(x)
            loss.backward()
            losses[-1] += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
        if step + 1 == save_at:
            states = {type(one).__name__: one.state_dict() for one in saved}
            torch.save({**states, "step": step + 1}, checkpoint)
    return losses, model


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        losses, model = train(Path(folder, "half.pt"))
        again, resumed = train(Path(folder, "half.pt"), resume=True)
    same = all(map(torch.equal, model.parameters(), resumed.parameters()))
    print(f"the loss fell from {losses[0]:.3f} to {losses[-1]:.5f} in {len(losses)} steps")
    print(f"the last {len(again)} steps again, from the checkpoint: {same and 'the same weights'}")
