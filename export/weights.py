"""Base weights, any rows of any tensor, as float32: 16- and 32-bit or bitsandbytes' 4-bit, local or on the hub.

    with open_base("owner/name", revision) as weights:
        weights.plan(names)                  # in the order of use
        values = weights.rows(name, rows)
        weights.release(name)                # a shard whose tensors are all released leaves the disk

Reads ``model.safetensors`` or the shards that ``model.safetensors.index.json`` names. Neither a whole tensor nor
PyTorch is needed, and a base on the hub takes the disk space of one shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from export.bitsandbytes_4bit import FourBitTensor, read_four_bit, state_names
from export.checkpoint_shards import INDEX_NAME, SINGLE_NAME, Shard, local_shards
from export.safetensors_file import ByteArray, FloatRows, RowIndices, SafetensorsFile, StoredTensor
from pipeline.errors import MedcotError

if TYPE_CHECKING:
    from export.hub_files import DownloadProgress
    from export.hub_shards import ShardFolder

__all__ = [
    "BaseWeights",
    "FloatRows",
    "RowIndices",
    "SafetensorsFile",
    "StoredTensor",
    "check_quantization",
    "open_base",
]

_CHECKED_AT_A_TIME = 1 << 16  # values; a block that stays in a core's cache


class BaseWeights:
    """All tensors of a base model, a folder or the given ``shards``. Raises MedcotError for missing or damaged files.

    ``origin`` names the base in messages. Packed 4-bit tensors appear once, under their own name and shape; the
    scales and tables beside them are no tensors of the model. Several threads may read at once.
    """

    def __init__(
        self, origin: Path | str, shards: Sequence[Shard] | None = None, scratch: ShardFolder | None = None
    ) -> None:
        self.origin = origin
        self._scratch = scratch
        self._shards = local_shards(Path(origin)) if shards is None else list(shards)
        self._shard_of = _by_tensor(self._shards)
        self._four_bit = self._read_four_bit()
        inner = {part for tensor in self._four_bit.values() for part in tensor.parts}
        inner |= set(state_names(self._shard_of).values())
        self._names = [name for name in self._shard_of if name not in inner]
        self._awaited = {id(shard): set(shard.tensors) & set(self._names) for shard in self._shards}
        self._kept = self._read_strays()

    def __enter__(self) -> BaseWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """After a failure a fetched shard stays, so that the next attempt goes on with it."""
        for shard in self._shards:
            shard.close()
        if self._scratch is not None:
            self._scratch.close(keep=kind is not None)

    @property
    def names(self) -> Sequence[str]:
        return self._names

    def stored(self, name: str) -> StoredTensor:
        if name in self._four_bit:
            return self._four_bit[name].stored
        try:
            return self._shard_of[name].tensors[name]
        except KeyError:
            pass
        if f"{name.removesuffix('.weight')}.qweight" in self._shard_of:
            raise MedcotError(f"{self.origin} is quantized by GPTQ or AWQ. {_WHAT_WORKS}")
        raise MedcotError(
            f"{self.origin} has no tensor {name}: the checkpoint is incomplete or its config.json "
            "belongs to another model. Download it again."
        )

    def shard_of(self, name: str) -> Shard:
        """The file that holds the tensor."""
        self.stored(name)
        return self._shard_of[name]

    def plan(self, names: Iterable[str]) -> None:
        """Only these tensors will be asked for: a shard is done with once all of them that it holds are released."""
        for awaited in self._awaited.values():
            awaited.clear()
        for name in names:
            self.stored(name)
            self._awaited[id(self._shard_of[name])].add(name)

    def by_shard(self, names: Iterable[str]) -> list[str]:
        """The names in an order in which one shard at a time suffices; as given where no shard has to be fetched."""
        given = list(names)
        for name in given:
            self.stored(name)
        if self._scratch is None:
            return given
        groups: dict[int, list[str]] = {}
        for name in given:
            groups.setdefault(id(self._shard_of[name]), []).append(name)
        return [name for group in groups.values() for name in group]

    def rows(self, name: str, rows: RowIndices | slice) -> FloatRows:
        """Rows of a tensor as float32 [n, columns]. Raises MedcotError where a value is NaN or infinite."""
        stored = self.stored(name)
        four_bit = self._four_bit.get(name)
        if four_bit is not None:
            return four_bit.rows(rows, self._read)
        values = self._shard_of[name].file().rows(name, rows)
        if not _all_finite(values):
            raise MedcotError(
                f"{stored.path}: tensor {name} holds NaN or infinite values; the file is "
                "damaged or the training that made it diverged."
            )
        return values

    def read_ahead(self, name: str, first: int, last: int) -> None:
        """The rows [first, last) will be asked for soon: the disk may begin to read."""
        four_bit = self._four_bit.get(name)
        if four_bit is None:
            stored = self.stored(name)
            row_bytes = (stored.end - stored.begin) // max(1, stored.shape[0])
            ranges = {name: (first * row_bytes, last * row_bytes)}
        else:
            ranges = four_bit.stored_ranges(first, last)
        for part, (begin, end) in ranges.items():
            if part not in self._kept:
                self._shard_of[part].file().read_ahead(part, begin, end)

    def release(self, name: str) -> None:
        """The tensor will not be asked for again; the last one of a shard from the hub frees its disk space."""
        shard = self._shard_of[name]
        awaited = self._awaited[id(shard)]
        awaited.discard(name)
        if not awaited:
            shard.discard()

    def _read(self, name: str, begin: int, end: int) -> ByteArray:
        if name in self._kept:
            return self._kept[name][begin:end]
        return self._shard_of[name].file().read(name, begin, end)

    def _read_four_bit(self) -> dict[str, FourBitTensor]:
        states = state_names(self._shard_of)
        stored = {name: shard.tensors[name] for name, shard in self._shard_of.items()} if states else {}
        content: dict[str, ByteArray] = {}
        for shard in self._shards:
            content |= shard.peek(name for name in states.values() if name in shard.tensors)
        return {name: read_four_bit(name, state, content[state].tobytes(), stored) for name, state in states.items()}

    def _read_strays(self) -> dict[str, ByteArray]:
        """Scales and tables that lie in another shard than their packed weights, so that one shard at a time suffices.

        A checkpoint is cut into shards between any two tensors, so each cut parts at most one weight from its scales.
        """
        kept: dict[str, ByteArray] = {}
        for name, tensor in self._four_bit.items():
            for part in tensor.parts:
                if self._shard_of[part] is not self._shard_of[name]:
                    kept |= self._shard_of[part].peek([part])
        return kept


def open_base(
    base: str,
    revision: str | None = None,
    *,
    endpoint: str | None = None,
    scratch: Path | None = None,
    progress: DownloadProgress | None = None,
) -> BaseWeights:
    """The weights of a local folder or a hub repository (``owner/name``).

    Shards that the hub's cache holds are read there. Others are fetched one by one into ``scratch`` (default: a
    folder in medcot's cache) and deleted when released. Without the hub, a complete cached copy serves.
    """
    if Path(base).is_dir():
        return BaseWeights(Path(base))
    from export.hub_files import HubRepository, HubUnreachable
    from export.hub_shards import ShardFolder, open_shards
    from pipeline.cache import cache_dir

    try:
        repository = HubRepository(base, revision, endpoint=endpoint)
    except HubUnreachable as error:
        return _cached_copy(base, revision, error)
    folder = ShardFolder((scratch or cache_dir() / "shards") / base.replace("/", "--"))
    try:
        return BaseWeights(base, open_shards(repository, folder, progress), folder)
    except BaseException:
        folder.close(keep=True)
        raise


def check_quantization(config: Mapping[str, Any], origin: Path | str) -> None:
    """Raise MedcotError unless ``config.json`` describes weights that export can read."""
    settings = config.get("quantization_config")
    if not settings:
        return
    if not isinstance(settings, dict):
        raise MedcotError(f"{origin}: quantization_config must be an object, found {settings!r}.")
    method = settings.get("quant_method", "an unnamed method")
    four_bit = settings.get("load_in_4bit") or settings.get("_load_in_4bit")
    if four_bit and method in ("bitsandbytes", "an unnamed method"):
        return
    if settings.get("load_in_8bit") or settings.get("_load_in_8bit"):
        method = "bitsandbytes' LLM.int8()"
    raise MedcotError(f"{origin} is quantized by {method}. {_WHAT_WORKS}")


_WHAT_WORKS = (
    "Export reads 16- and 32-bit safetensors and bitsandbytes' 4-bit ones (NF4, FP4): give the unquantized model."
)


def _all_finite(values: FloatRows) -> bool:
    flat = values.reshape(-1)
    return all(
        bool(np.isfinite(flat[start : start + _CHECKED_AT_A_TIME]).all())
        for start in range(0, flat.size, _CHECKED_AT_A_TIME)
    )


def _by_tensor(shards: Sequence[Shard]) -> dict[str, Shard]:
    found: dict[str, Shard] = {}
    for shard in shards:
        for name, tensor in shard.tensors.items():
            if name in found:
                raise MedcotError(
                    f"Tensor {name} is in {tensor.path} and in {found[name].tensors[name].path}: the shards "
                    "do not belong together. Download the model again."
                )
            found[name] = shard
    return found


def _cached_copy(base: str, revision: str | None, unreachable: MedcotError) -> BaseWeights:
    """The copy in the hub's cache, or the error that the hub gave."""
    from huggingface_hub import try_to_load_from_cache

    found = [try_to_load_from_cache(base, name, revision=revision) for name in (INDEX_NAME, SINGLE_NAME)]
    cached = [Path(path) for path in found if isinstance(path, str)]
    if not cached:
        raise unreachable
    try:
        return BaseWeights(cached[0].parent)
    except MedcotError as error:
        raise MedcotError(f"{unreachable} The copy in the hub's cache does not serve: {error}") from error
