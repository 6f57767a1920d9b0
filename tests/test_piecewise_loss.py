"""The held-out loss in pieces is transformers' own loss, for every architecture, and never needs all logits."""

from collections.abc import Callable

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from tiny_models import LORA_TARGETS
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.cohere import CohereConfig
from transformers.models.gemma2 import Gemma2Config
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.granite import GraniteConfig
from transformers.models.llama import LlamaConfig
from transformers.models.phi3 import Phi3Config
from transformers.models.qwen3 import Qwen3Config

from pipeline.training import piecewise_loss
from pipeline.training.piecewise_loss import summed_loss

VOCABULARY, IGNORED = 60, -100
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
# What stands between hidden states and the loss: nothing, a soft cap, a factor, a divisor.
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "qwen3": lambda: Qwen3Config(**SHAPE),
    "phi3": lambda: Phi3Config(**SHAPE),
    "gemma2": lambda: Gemma2Config(**SHAPE, final_logit_softcapping=2.0),
    "gemma3": lambda: Gemma3TextConfig(**SHAPE),
    "cohere": lambda: CohereConfig(**SHAPE, logit_scale=0.3),
    "granite": lambda: GraniteConfig(**SHAPE, logits_scaling=4.0),
}


def model_of(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()


def rows_of(lengths: list[int], prompt: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, attention mask and labels of rows with these lengths, padded on the right, prompts without labels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    mask = torch.stack([(torch.arange(max(lengths)) < length).long() for length in lengths])
    labels = ids.where(mask.bool() & (torch.arange(max(lengths)) >= prompt), torch.tensor(IGNORED))
    return ids * mask, mask, labels


@pytest.mark.parametrize("lengths", [[23, 23], [23, 9, 14]], ids=["equal", "padded"])
@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_the_loss_of_transformers(name: str, lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(piecewise_loss, "PIECE_POSITIONS", 8)
    model, (ids, mask, labels) = model_of(name), rows_of(lengths)
    with torch.no_grad():
        expected = float(model(input_ids=ids, attention_mask=mask, labels=labels).loss)
        loss, tokens = summed_loss(model, ids, mask, labels)
    assert tokens == sum(length - 3 for length in lengths)
    assert loss / tokens == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_that_of_an_adapted_model_under_mixed_precision(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the trainer has it: peft around the model, autocast and 32-bit outputs by accelerate around both."""
    monkeypatch.setattr(piecewise_loss, "PIECE_POSITIONS", 8)
    model = get_peft_model(model_of("llama"), LoraConfig(r=4, target_modules=LORA_TARGETS, init_lora_weights=False))
    monkeypatch.setattr(Accelerator, "autocast", lambda self: torch.autocast("cpu", dtype))
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare(model).eval()
    ids, mask, labels = rows_of([23, 9, 14])
    with torch.no_grad(), accelerator.autocast():
        logits = prepared(input_ids=ids, attention_mask=mask).logits
        assert logits.dtype == torch.float32
        expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        loss, _ = summed_loss(prepared, ids, mask, labels)
    # A product of other rows together may be added up in another order before it is rounded to 16 bit.
    assert loss == pytest.approx(float(expected), rel=1e-4)


def test_the_decoder_runs_once_and_the_output_matrix_on_one_piece_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(piecewise_loss, "PIECE_POSITIONS", 16)
    model, batch = model_of("llama"), rows_of([23, 9, 14])
    decoded, positions = [], []
    model.model.layers[0].register_forward_hook(lambda *_: decoded.append(1))
    model.lm_head.register_forward_hook(lambda module, inputs, logits: positions.append(logits.shape[:-1].numel()))
    with torch.no_grad():
        _, tokens = summed_loss(model, *batch)
    assert len(decoded) == 1
    assert sum(positions) == tokens == 37 and max(positions) == 16


def test_the_decoder_is_left_as_it_was_even_by_an_error() -> None:
    model, (ids, mask, labels) = model_of("llama"), rows_of([9])
    with pytest.raises(IndexError):
        summed_loss(model, ids + VOCABULARY, mask, labels)
    assert "forward" not in vars(model.model)
    replaced = model.model.forward = model.model.forward  # as accelerate's hooks replace it
    with torch.no_grad():
        summed_loss(model, ids, mask, labels)
    assert vars(model.model)["forward"] is replaced


def test_nothing_to_predict_is_no_loss() -> None:
    ids, mask, labels = rows_of([9])
    assert summed_loss(model_of("llama"), ids, mask, torch.full_like(labels, IGNORED)) == (0.0, 0)


class Flat(PreTrainedModel):
    """A language model without a decoder of its own."""

    config_class = LlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.head = nn.Linear(16, VOCABULARY)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, **_: object) -> object:
        from transformers.modeling_outputs import CausalLMOutput

        return CausalLMOutput(logits=self.head(self.embedding(input_ids)))


def test_without_a_decoder_the_logits_are_whole_and_the_loss_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(piecewise_loss, "PIECE_POSITIONS", 8)
    model, (ids, mask, labels) = Flat(LlamaConfig(**SHAPE)), rows_of([23, 9])
    calls = []
    model.head.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        loss, _ = summed_loss(model, ids, mask, labels)
        assert len(calls) == 1
        logits = model(ids).logits[:, :-1].flatten(0, 1)
    expected = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    assert loss == pytest.approx(float(expected), rel=1e-6)
