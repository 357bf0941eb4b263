// Everything that the evaluator's files use from outside, included before the instruction set is
// chosen: a standard function must not be compiled for it and then serve the others.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <new>
#include <type_traits>

#include "evaluator.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif
