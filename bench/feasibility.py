"""What evaluation and benchmark would refuse, told before training: called by ``pipeline/feasibility.py``."""

from __future__ import annotations

from bench.multiple_choice import option_tokens
from bench.speed_probe import needed_context
from pipeline.base_model import load_chat_format
from pipeline.feasibility import Preview, refusal_of


def evaluation_problems(preview: Preview) -> list[str]:
    """Gates on what the data cannot show, and options that the vocabulary cannot name.

    A gate that needs the base is refused by the configuration itself where the base is left out.
    """
    records = preview.records
    if not records:  # what is wrong with the data is told already
        return []
    evaluation = preview.config.evaluation
    with_options = [] if evaluation.choice_rows == 0 else [record for record in records if record.options]
    there = {
        "options": bool(with_options),
        "reasoning": any(record.example.reasoning is not None for record in records),
    }
    found = [gate.unmeasured for gate in evaluation.parsed_gates if not there.get(gate.metric.needs or "", True)]
    if with_options:
        most = max(len(record.options or ()) for record in with_options)
        chat_format = load_chat_format(preview.base, preview.config.prompt.system)
        found += refusal_of(lambda: option_tokens(chat_format, with_options[0].example.question, None, most))
    return found


def bench_problems(preview: Preview) -> list[str]:
    bench = preview.config.bench
    depths = tuple(depth for depth in bench.depths if depth > 0)
    return refusal_of(lambda: needed_context(depths, bench.prompt_tokens, bench.generated_tokens, bench.context_tokens))
