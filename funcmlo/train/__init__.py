"""Running a program: data, the loop, callbacks and checkpoints."""

from funcmlo.train.callbacks import Callback, Start
from funcmlo.train.checkpoint import Checkpoint, clear, load, newest, save
from funcmlo.train.csv_log import CSVLogger
from funcmlo.train.early_stopping import EarlyStopping
from funcmlo.train.history import History
from funcmlo.train.mlflow_log import MLflowLogger
from funcmlo.train.tensorboard_log import TensorBoardLogger
from funcmlo.train.wandb_log import WandbLogger

__all__ = [
    "CSVLogger",
    "Callback",
    "Checkpoint",
    "EarlyStopping",
    "History",
    "MLflowLogger",
    "Start",
    "TensorBoardLogger",
    "WandbLogger",
    "clear",
    "load",
    "newest",
    "save",
]
