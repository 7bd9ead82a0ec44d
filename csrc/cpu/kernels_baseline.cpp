// What every CPU of the architecture has: SSE2 on x86-64; elsewhere whatever the compiler makes of 16-byte vectors.
#define SK_ISA baseline
#define SK_VECTOR_BYTES 16
#include "kernels.inl"
