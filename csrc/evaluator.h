// What one instruction set's build of the evaluator offers.
#pragma once

#include "plan.h"

namespace psfast {

template <class R>
struct Evaluator {
  int narrow, wide;  // streams a group can hold, in one vector and at most
  void (*evaluate)(const Context<R>&, const Trial<R>*, const Group&, const Stream*, double* diff);
  void (*refresh)(const Context<R>&, int64_t layer, bool behind_attention, int64_t b0, int n,
                  bool keep_all);
  void (*attend_inputs)(const Context<R>&, int64_t layer, int64_t b);
  void (*prepare)(const Context<R>&, int64_t layer, bool products);
  void (*prepare_again)(const Context<R>&, const Coordinate&);
};

namespace portable {
template <class R> Evaluator<R> evaluator();
}
#if defined(__x86_64__)
namespace avx2 {
template <class R> Evaluator<R> evaluator();
}
namespace avx512 {
template <class R> Evaluator<R> evaluator();
}
#endif

// The best that this machine runs, or the one that `name` asks for.
const char* instruction_set();
template <class R>
const Evaluator<R>& evaluator();

}  // namespace psfast
