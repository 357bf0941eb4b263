"""Data, a quiet Trainer and a record of its steps, for tests of modules in Lightning."""

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint


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


class Recorder(Callback):
    """The logged values of every step, and the backward passes."""

    def __init__(self):
        self.steps, self.backwards, self.global_steps = [], 0, []

    def on_after_backward(self, trainer, module):
        self.backwards += any(p.grad is not None for p in module.parameters())

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.steps.append({k: v.item() for k, v in trainer.logged_metrics.items()})
        self.global_steps.append(trainer.global_step)
