"""Hugging Face's Trainer and a small GPT-2 that learns Python's help by characters.

The loss is a module that is called outside the model: K-FAC sees it, and Trainer's accumulation
counts tokens right.
"""

import os
import tempfile
from pydoc_data.topics import topics

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import kronewton as kn

LENGTH = 32
text = "".join(topics.values())[:200_000]
number = {character: i for i, character in enumerate(sorted(set(text)))}
tokens = torch.tensor([number[c] for c in text[: len(text) // LENGTH * LENGTH]])
data = [{"input_ids": row, "labels": row} for row in tokens.reshape(-1, LENGTH)]

criterion = nn.CrossEntropyLoss(reduction="sum")


def next_token(outputs, labels, num_items_in_batch):
    """The mean over the step's tokens, of which this part has some."""
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return criterion(logits, labels[:, 1:].flatten()) / num_items_in_batch


def trainer_of(folder, options=None, **arguments):
    """A Trainer that is ready to train."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(number), n_positions=LENGTH, n_embd=48, n_layer=2, n_head=4, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    optimizer = kn.KFAC(model, criterion, **(options or {}))
    settings = {
        "max_steps": 60,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0,  # K-FAC bounds its own step; Trainer would clip at 1
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    return Trainer(
        model,
        TrainingArguments(folder, **{**settings, **arguments}),
        train_dataset=data,
        compute_loss_func=next_token,
        optimizers=(optimizer, None),  # None: Trainer's own schedule, from 1 to 0
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(folder)
        trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    print(trainer.optimizer.optimizer.coverage())
    print(f"the loss fell from {losses[0]:.3f} to {losses[-1]:.3f}, each a mean of ten steps")
