"""Which function quantizes a type on this machine: a kernel that gives ggml's bytes here, or ggml itself."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import cache, cached_property, partial

from gguf import GGMLQuantizationType as T

from export import ggml
from export.quantizers.kernel import Kernel
from export.quantizers.self_check import Pack, Verdicts, difference, load, machine_folder
from pipeline.errors import MedcotError

# Set to "ggml", it leaves everything to ggml: for comparisons.
VARIABLE = "MEDCOT_QUANTIZERS"


def families() -> Mapping[T, Kernel]:
    """All kernels there are; raises ImportError where numba is not installed."""
    import numba

    others = numba.config.CACHE_DIR
    # By itself numba looks at no other file than a kernel's own, and would not see a change in lanes.py.
    numba.config.CACHE_DIR = others or str(machine_folder())
    try:
        from export.quantizers import codebook, scale_and_min, symmetric
    finally:
        numba.config.CACHE_DIR = others
    return {**scale_and_min.KERNELS, **symmetric.KERNELS, **codebook.KERNELS}


class Chooser:
    """Kernels are compiled and checked at their first use; ``notes`` says in sentences what had to be left to ggml."""

    def __init__(
        self,
        find_kernels: Callable[[], Mapping[T, Kernel]] = families,
        find_verdicts: Callable[[], Verdicts] = Verdicts,
    ) -> None:
        self.notes: list[str] = []
        self._find_kernels = find_kernels
        self._find_verdicts = find_verdicts
        self._chosen: dict[tuple[T, bool], Pack] = {}
        self._choosing = threading.RLock()

    def function(self, ggml_type: T, guided: bool) -> Pack:
        """What quantizes ``ggml_type``, ``guided`` by an importance matrix or not."""
        variant = _variant(ggml_type, guided)
        with self._choosing:
            if variant not in self._chosen:
                self._chosen[variant] = self._choose(*variant)
            return self._chosen[variant]

    def prepare(self, wanted: Iterable[tuple[T, bool]], announce: Callable[[str], None]) -> None:
        """Compile and check now what ``function`` would at its first call; ``announce`` is told where that takes long.

        ``wanted`` are arguments of ``function``.
        """
        variants = sorted({_variant(*each) for each in wanted})
        if any(self._pack(*each) and not self._verdicts.known(_name(*each)) for each in variants):
            announce("Compiling the quantizers for this CPU, once: some seconds.")
        for each in variants:
            self.function(*each)

    def _choose(self, ggml_type: T, guided: bool) -> Pack:
        by_ggml = partial(ggml.quantize_rows, ggml_type=ggml_type)
        pack, name = self._pack(ggml_type, guided), _name(ggml_type, guided)
        if pack is None:
            return by_ggml
        try:
            load(ggml_type, pack, guided=guided)
            found = self._verdicts.of(name, lambda: difference(ggml_type, pack, guided=guided))
        except Exception as error:  # numba's and LLVM's have no class in common, and ggml can do what they cannot
            self.notes.append(f"{name}: the quantizer cannot be compiled ({_first_line(error)}), {_INSTEAD}")
            return by_ggml
        if found is not None:
            self.notes.append(f"{name}: the quantizer's bytes are not ggml's on this machine ({found}), {_INSTEAD}")
            return by_ggml
        return pack

    def _pack(self, ggml_type: T, guided: bool) -> Pack | None:
        kernel = self._kernels.get(ggml_type, Kernel())
        if not guided:
            plain = kernel.plain
            return None if plain is None else lambda rows, importance, packed: plain(rows, packed)
        return kernel.guided  # type: ignore[return-value]  # which is called with an importance only

    @cached_property
    def _kernels(self) -> Mapping[T, Kernel]:
        forced = os.environ.get(VARIABLE, "")
        if forced not in ("", "ggml"):
            raise MedcotError(f"{VARIABLE} is '{forced}': set it to ggml, or not at all.")
        if forced:
            return {}
        try:
            return self._find_kernels()
        except Exception as error:  # a numba that does not fit its numpy or its LLVM raises anything
            self.notes.append(f"numba cannot be used ({_first_line(error)}), {_INSTEAD}")
            return {}

    @cached_property
    def _verdicts(self) -> Verdicts:
        return self._find_verdicts()


_INSTEAD = "so ggml's own is used: the same bytes, several times slower."


def _variant(ggml_type: T, guided: bool) -> tuple[T, bool]:
    return ggml_type, guided and ggml_type not in ggml.IGNORES_IMPORTANCE


def _name(ggml_type: T, guided: bool) -> str:
    return f"{ggml_type.name} with importance" if guided else ggml_type.name


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


@cache
def chooser() -> Chooser:
    """The one of this process."""
    return Chooser()
