// The kernels for any processor of the target architecture (SSE2 on x86-64, NEON on arm64).
#include <cstdint>
#include <type_traits>

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define SRN_ISA isa_baseline
#define SRN_ISA_NAME "baseline"
#define SRN_VECTOR_BYTES 16
#include "kernels.inc"
