// x86-64 with AVX-512 F, BW, VL and DQ.
#define SK_ISA avx512
#define SK_VECTOR_BYTES 64
#include "kernels.inl"
