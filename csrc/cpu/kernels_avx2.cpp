// x86-64 with AVX2 and FMA.
#define SK_ISA avx2
#define SK_VECTOR_BYTES 32
#include "kernels.inl"
