#include "evaluator_includes.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")
#endif

#define PSFAST_AVX512
#define PSFAST_NAMESPACE avx512
#define PSFAST_BYTES 64
#define PSFAST_VECTORS 2
#define PSFAST_OUTPUTS 8
#include "evaluator_body.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
