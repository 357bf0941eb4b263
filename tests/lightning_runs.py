"""Data and a quiet Trainer for tests of modules in Lightning."""

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint


def batches(count=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 9, 3, generator=generator)
    return list(zip(x, x.sum(-1, keepdim=True), strict=True))


def loader(count=3):
    return torch.utils.data.DataLoader(batches(count), batch_size=None)


def trainer(tmp_path, *callbacks, **options):
    defaults = {
        "max_epochs": 2,
        "logger": False,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "default_root_dir": tmp_path,
        "log_every_n_steps": 1,
    }
    return L.Trainer(callbacks=list(callbacks), **{**defaults, **options})
