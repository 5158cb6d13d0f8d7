"""Hugging Face's Trainer and a small residual net that reads digits.

Trainer makes the optimizer itself: of "model" it takes K-FAC's first argument.
"""

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded

import torch
from sklearn.datasets import load_digits
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

import kronewton as kn

images, labels = load_digits(return_X_y=True)
pixels = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
data = [{"pixel_values": x, "labels": int(y)} for x, y in zip(pixels, labels, strict=True)]

criterion = nn.CrossEntropyLoss(reduction="sum")


def loss_of(outputs, labels, num_items_in_batch):
    """The mean over the step's examples, of which this part has some."""
    return criterion(outputs.logits, labels) / num_items_in_batch


def correct(prediction):
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def trainer_of(folder, options=None, **arguments):
    """A Trainer that is ready to train."""
    torch.manual_seed(0)
    config = ResNetConfig(
        num_channels=1, num_labels=10, layer_type="basic",
        embedding_size=16, hidden_sizes=[32, 32], depths=[1, 1],
    )  # fmt: skip
    model = ResNetForImageClassification(config)
    settings = {
        "max_steps": 60,
        "per_device_train_batch_size": 64,
        "max_grad_norm": 0,  # K-FAC bounds its own step; Trainer would clip at 1
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    return Trainer(
        model,
        TrainingArguments(folder, **{**settings, **arguments}),
        train_dataset=data[:1500],
        eval_dataset=data[1500:],
        compute_loss_func=loss_of,
        compute_metrics=correct,
        optimizer_cls_and_kwargs=(
            kn.KFAC,
            {"model": model, "criterion": criterion, **(options or {})},
        ),
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(folder)
        trainer.train()
        accuracy = trainer.evaluate()["eval_accuracy"]
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    print(trainer.optimizer.optimizer.coverage())
    print(f"the loss fell from {losses[0]:.3f} to {losses[-1]:.3f}, each a mean of ten steps")
    print(f"of digits that it has not seen it reads {accuracy:.1%}")
