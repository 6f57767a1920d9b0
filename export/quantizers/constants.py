"""Float32 constants of the searches: a float literal is float64 in numba and does not mix with lanes."""

import numpy as np

ZERO, ONE, TENTH = np.float32(0), np.float32(1), np.float32(0.1)
# Values of a smaller magnitude, all of them, count as zeros: GROUP_MAX_EPS in ggml/src/ggml-quants.c.
ALL_ZEROS = np.float32(1e-15)
