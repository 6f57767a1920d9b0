"""Base weights and adapter to GGUF files, in one pass over the base.

    medcot export --base BASE --adapter DIR --out DIR --quant F16 --quant Q4_K_M

Each tensor is read a block of rows at a time, the adapter's change is added in 32 bit, and every file gets
the block in its own type; neither a merged checkpoint nor a whole tensor is ever in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from export.adapter_gguf import AdapterType, check_expressible, write_adapter_gguf
from export.architecture import Architecture, ModelTensor, read_architecture
from export.base_match import base_mismatch
from export.checkpoint_match import check_tensors
from export.fingerprint import export_fingerprint, model_fingerprint
from export.gguf_file import GgufPlan
from export.importance_file import ImportanceMatrix
from export.measured_export import export_with_imatrix, measuring_text
from export.merged_weights import MergedWeights, WeightedAdapter
from export.packages import write_modelfile
from export.quant_types import file_type
from export.quantizers.choice import chooser
from export.stream import Output, Progress, Role, tensors_by_shard, write_files
from export.tokenizer_metadata import Vocabulary, read_vocabulary, with_special_ids
from export.weights import BaseWeights, open_base
from pipeline.adapter_recipe import RECIPE_NAME, check_template, read_recipe
from pipeline.artifacts import atomic_path
from pipeline.config import Config
from pipeline.errors import MedcotError
from pipeline.results import ExportedFile, ExportedModels
from pipeline.tokenizer_files import has_tokenizer

if TYPE_CHECKING:
    from export.hub_files import DownloadProgress

Adapters = Path | WeightedAdapter | Sequence[Path | WeightedAdapter] | None


def export(config: Config, inputs: dict[str, Path], out_dir: Path) -> ExportedModels:
    """Stage: the trained adapter (``inputs["train"]``) and its base to GGUF files in ``out_dir``.

    With ``imatrix: auto`` an importance matrix is measured on the training text (``inputs["prepare"]``).
    """
    from pipeline.prepare import TRAIN_FILE
    from pipeline.progress import ExportProgressBar

    with ExportProgressBar() as bar, ExitStack() as stack:
        folder, base_weights = open_model(config.model.base, config.model.revision, fetching=bar.fetched)
        weights = stack.enter_context(base_weights)

        def write(
            out_dir: Path,
            quantizations: Sequence[str],
            base_quantization: str | None,
            importance: ImportanceMatrix | None,
        ) -> ExportedModels:
            return export_models(
                folder,
                inputs["train"],
                out_dir,
                config.name,
                quantizations,
                base_quantization,
                bar.written,
                announce=bar.note,
                ship=config.export.ship if config.export.ship in quantizations else None,
                system=config.prompt.system,
                given_as=config.model.base,
                weights=weights,
                importance=importance,
            )

        return export_with_imatrix(
            config.export.imatrix,
            write,
            out_dir,
            config.name,
            config.export.quantizations,
            config.export.ship if config.export.include_base else None,
            lambda: measuring_text(
                tokenizer_folder(folder, inputs["train"]),
                inputs["prepare"] / TRAIN_FILE,
                config.prompt.system,
                tokens=config.export.imatrix_tokens,
            ),
            lambda: model_fingerprint(folder, weights, [WeightedAdapter(inputs["train"])]),
            bar.measured,
            bar.note,
        )


def open_model(
    base: str, revision: str | None = None, *, fetching: DownloadProgress | None = None
) -> tuple[Path, BaseWeights]:
    """Folder with a base's configuration and tokenizer, and its weights, which may be read from the hub shard by shard.

    ``base`` is a hub id, a folder, or ``package:<module>/<file>.gguf``; ``fetching`` is told of each shard's download.
    """
    from pipeline.base_model import PACKAGE_PREFIX, local_base

    on_hub = not base.startswith(PACKAGE_PREFIX) and not Path(base).is_dir()
    folder = local_base(base, revision, weights=not on_hub)
    return folder, open_base(base, revision, progress=fetching) if on_hub else BaseWeights(folder)


def export_models(
    base: Path,
    adapter: Adapters,
    out_dir: Path,
    name: str,
    quantizations: Sequence[str],
    base_quantization: str | None = None,
    progress: Progress | None = None,
    *,
    ship: str | None = None,
    system: str | None = None,
    adapter_gguf: AdapterType | None = None,
    given_as: str | None = None,
    weights: BaseWeights | None = None,
    importance: ImportanceMatrix | None = None,
    announce: Callable[[str], None] = lambda text: None,
) -> ExportedModels:
    """Write ``<name>-<QUANT>.gguf`` for each quantization, ``<name>-base-<QUANT>.gguf`` and a Modelfile.

    ``base`` is a folder as Hugging Face lays it out; its tensors come from ``weights`` where given. The tokenizer
    and chat template come from the first adapter's folder that has them. ``ship`` is the quantization that the
    Modelfile names (default: the last one), ``given_as`` what the user called the base, ``adapter_gguf`` the type of
    an additional ``<name>-adapter.gguf``; ``importance`` guides the quantizers. All files appear together at the end,
    or none; raises MedcotError. After an interruption the same call goes on where it was and gives the same bytes;
    ``announce`` is told in a sentence. An adapter that says what it was trained with (medcot.json) is held to its chat
    template, and gives the system prompt where ``system`` is None.
    """
    adapters = _weighted(adapter)
    if adapter_gguf and not adapters:
        raise MedcotError("An adapter GGUF is asked for and no adapter is given.")
    architecture = read_architecture(base)
    with BaseWeights(base) if weights is None else nullcontext(weights) as reader:
        check_tensors(architecture, reader)
        merged = MergedWeights(reader, adapters, architecture)
        if adapter_gguf:
            check_expressible(architecture, merged.adapters)
        models = _models(base, adapters, architecture, merged, with_base=base_quantization is not None)
        recipe = read_recipe(tokenizer_folder(base, adapters))
        check_template(recipe, models["tuned"][1].chat_template, str(tokenizer_folder(base, adapters)))
        system = recipe.system if system is None and recipe else system
        tensors = {role: tensors_by_shard(each, reader, merged) for role, (each, _) in models.items()}
        if importance is not None:
            importance.check_fits({tensor.name: tensor.shape for tensor in tensors["tuned"]})
        outputs = _outputs(out_dir, name, quantizations, base_quantization, models, tensors, system, importance)
        adapter_path = out_dir / f"{name}-adapter.gguf" if adapter_gguf else None

        def write_adapter(stack: ExitStack) -> None:
            if adapter_path is not None and adapter_gguf is not None:
                for leftover in out_dir.glob(f".{adapter_path.name}.*.tmp"):  # a killed export's
                    leftover.unlink()
                temporary = stack.enter_context(atomic_path(adapter_path))
                write_adapter_gguf(temporary, f"{name} adapter", architecture, merged.adapters, adapter_gguf)

        plans = {output.path.name: output.plan for output in outputs}
        write_files(
            outputs,
            tensors,
            reader,
            merged,
            progress or (lambda tensor, done, total: None),
            fingerprint=export_fingerprint(plans, base, reader, adapters),
            announce=announce,
            beside=write_adapter,
        )
    shipped = f"{name}-{file_type(ship or quantizations[-1]).name}.gguf"
    tuned, vocabulary = models["tuned"]
    write_modelfile(out_dir / "Modelfile", shipped, vocabulary, system, tuned.context)
    mismatches = [base_mismatch(each, base, given_as, architecture) for each, _ in merged.adapters]
    return ExportedModels(
        architecture=architecture.name,
        parameters=outputs[0].plan.parameters,
        adapter_matrices_merged=merged.changed,
        ship=shipped,
        base=next((output.path.name for output in outputs if output.role == "base"), None),
        adapter_gguf=adapter_path.name if adapter_path else None,
        warnings=[
            *architecture.remarks,
            *models["tuned"][1].remarks,
            *(text for text in mismatches if text),
            *_without_recipe(adapters),
            *chooser().notes,
        ],
        files=[
            ExportedFile(
                name=output.path.name,
                role=output.role,
                quantization=output.plan.file_type.name,
                size_bytes=output.path.stat().st_size,
                bits_per_weight=output.plan.bits_per_weight,
                tensor_types=output.plan.type_counts,
            )
            for output in outputs
        ],
    )


def tokenizer_folder(base: Path, adapter: Adapters) -> Path:
    """The folder whose tokenizer trained: the first adapter's that has one beside it, else the base's."""
    for each in _weighted(adapter):
        if has_tokenizer(each.folder):
            return each.folder
    return base


def _without_recipe(adapters: Sequence[WeightedAdapter]) -> list[str]:
    return [
        f"{each.folder} has no {RECIPE_NAME}: its chat template is not compared."
        for each in adapters
        if read_recipe(each.folder) is None
    ]


def _weighted(adapter: Adapters) -> list[WeightedAdapter]:
    if adapter is None:
        return []
    several = [adapter] if isinstance(adapter, Path | WeightedAdapter) else adapter
    return [WeightedAdapter(each) if isinstance(each, Path) else each for each in several]


_Model = tuple[Architecture, Vocabulary]


def _models(
    base: Path,
    adapters: Sequence[WeightedAdapter],
    architecture: Architecture,
    merged: MergedWeights,
    *,
    with_base: bool,
) -> dict[Role, _Model]:
    """Shape and vocabulary of the tuned model and, where it is wanted, of the base.

    The base is written with the tokenizer and template that trained, unless tokens were added that it has no rows for.
    """

    def vocabulary(folder: Path, size: int) -> Vocabulary:
        return with_special_ids(read_vocabulary(folder, size), architecture.config)

    tuned = merged.architecture
    models: dict[Role, _Model] = {
        "tuned": (tuned, vocabulary(tokenizer_folder(base, adapters), tuned.vocabulary)),
    }
    if with_base:
        same = tuned.vocabulary == architecture.vocabulary
        models["base"] = (architecture, models["tuned"][1] if same else vocabulary(base, architecture.vocabulary))
    return models


def _outputs(
    out_dir: Path,
    name: str,
    quantizations: Sequence[str],
    base_quantization: str | None,
    models: dict[Role, _Model],
    tensors: dict[Role, list[ModelTensor]],
    system: str | None,
    importance: ImportanceMatrix | None,
) -> list[Output]:
    if not quantizations:
        raise MedcotError("No quantization is asked for: name at least one, for example Q4_K_M.")
    wanted: dict[str, tuple[Role, str]] = {
        f"{name}-{file_type(quantization).name}.gguf": ("tuned", quantization) for quantization in quantizations
    }
    if base_quantization:
        wanted[f"{name}-base-{file_type(base_quantization).name}.gguf"] = ("base", base_quantization)
    return [
        Output(
            out_dir / file_name,
            role,
            GgufPlan.of(
                name if role == "tuned" else f"{name} base",
                file_type(quantization),
                *models[role],
                tensors[role],
                system,
                importance,
            ),
        )
        for file_name, (role, quantization) in wanted.items()
    ]
