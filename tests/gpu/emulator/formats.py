"""Number formats: bit patterns to float32 and back, with the rounding of PTX's cvt."""

import numpy as np

UNSIGNED = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16), 4: np.dtype(np.uint32), 8: np.dtype(np.uint64)}
SIGNED = {1: np.dtype(np.int8), 2: np.dtype(np.int16), 4: np.dtype(np.int32), 8: np.dtype(np.int64)}
# How the bits of a PTX type are looked at. bf16, tf32 and the packed types have no NumPy type: their bits stay
# unsigned.
DTYPES: dict[str, np.dtype] = {
    **{f"{kind}{8 * size}": dtype for kind in "bu" for size, dtype in UNSIGNED.items()},
    **{f"s{8 * size}": dtype for size, dtype in SIGNED.items()},
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    "bf16": UNSIGNED[2],
    "tf32": UNSIGNED[4],
    "f16x2": UNSIGNED[4],
    "bf16x2": UNSIGNED[4],
    "pred": np.dtype(np.bool_),
}
NAN16 = np.uint16(0x7FFF)  # the NaN that PTX conversions to f16 and bf16 give
NAN32 = np.uint32(0x7FFFFFFF)


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x: np.ndarray) -> np.ndarray:
    """Nearest, ties to even."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), NAN16, rounded.astype(np.uint16))


def f32_to_bf16_toward_zero(x: np.ndarray) -> np.ndarray:
    bits = (np.asarray(x, np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), NAN16, bits)


def f32_to_f16(x: np.ndarray) -> np.ndarray:
    """Nearest, ties to even, as bits."""
    return np.where(np.isnan(x), NAN16, np.asarray(x).astype(np.float16).view(np.uint16))


def f16_to_f32(bits: np.ndarray) -> np.ndarray:
    return bits.view(np.float16).astype(np.float32)


def f32_to_tf32(x: np.ndarray, ties_to_even: bool) -> np.ndarray:
    """10 mantissa bits in a 32-bit pattern. PTX's rna rounds ties away from zero."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    half = np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1)) if ties_to_even else np.uint32(0x1000)
    rounded = np.where(np.isinf(x), bits, (bits + half) & np.uint32(0xFFFFE000))
    return np.where(np.isnan(x), NAN32, rounded)


def tf32_to_f32(bits: np.ndarray) -> np.ndarray:
    """Tensor cores look at the upper 19 bits only."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


# What tensor cores read: element type -> (bytes, decoder).
MATRIX_ELEMENTS = {"f16": (2, f16_to_f32), "bf16": (2, bf16_to_f32), "tf32": (4, tf32_to_f32)}


def flush_subnormals(x: np.ndarray) -> np.ndarray:
    """The .ftz of single precision: subnormal numbers count as zero of the same sign."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)
