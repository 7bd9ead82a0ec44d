// AArch64, every CPU of which has NEON.
#define SK_ISA neon
#define SK_VECTOR_BYTES 16
#include "kernels.inl"
