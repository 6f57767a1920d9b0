"""ggml's quantization types, computed in SIMD lanes with numba: ggml's own bytes, many times faster."""
