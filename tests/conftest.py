"""One thread for each worker: small matrices on many threads are slower, and workers compete."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch, and for commands that tests start

import torch

torch.set_num_threads(1)
