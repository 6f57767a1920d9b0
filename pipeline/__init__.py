"""From a data set to a LoRA adapter: configuration, artifacts, data, prompts, training, and the driver."""

__version__ = "0.1.0"
