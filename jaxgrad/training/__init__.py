"""Training: one compiled loop of gradient and update, that can be stopped and go on."""

from jaxgrad.training.results import BatchError, TrainResult, TrainState
from jaxgrad.training.rules import update_rule
from jaxgrad.training.train import train

__all__ = ["BatchError", "TrainResult", "TrainState", "train", "update_rule"]
