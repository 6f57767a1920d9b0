"""How a reasoning model's tokens are drawn unless its file or its user says otherwise.

DeepSeek's usage recommendations for R1 and its distillations: https://huggingface.co/deepseek-ai/DeepSeek-R1. Models
tuned to think in the same way get the same.
"""

DEFAULT_TEMPERATURE = 0.6
DEFAULT_TOP_P = 0.95
