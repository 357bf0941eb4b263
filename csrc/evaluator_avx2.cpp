#include "evaluator_includes.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define PSFAST_AVX2
#define PSFAST_NAMESPACE avx2
#define PSFAST_BYTES 32
#define PSFAST_VECTORS 2
#define PSFAST_OUTPUTS 4
#include "evaluator_body.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
