"""What a family of quantizers offers for one type."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.float32]  # [n, columns], C-contiguous, finite
Importance = npt.NDArray[np.float32]  # [columns]
Packed = npt.NDArray[np.uint8]  # [n, bytes per row], C-contiguous; filled by the kernel

Plain = Callable[[Rows, Packed], None]
Guided = Callable[[Rows, Importance, Packed], None]


@dataclass(frozen=True)
class Kernel:
    """Two functions compiled at their first call, which release the interpreter's lock; None is left to ggml."""

    plain: Plain | None = None
    guided: Guided | None = None
