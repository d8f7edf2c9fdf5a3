"""Networks that the benchmarks train as lower levels: ordinary modules, written out so that nothing needs a download."""

from paper_repro.networks.lora import LoRALinear, lora
from paper_repro.networks.lstm import LSTM
from paper_repro.networks.resnet import ResNet, resnet18, resnet32
from paper_repro.networks.transformer import Transformer

__all__ = ["LSTM", "LoRALinear", "ResNet", "Transformer", "lora", "resnet18", "resnet32"]
