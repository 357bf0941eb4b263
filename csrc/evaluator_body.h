// The body of each instruction set's file. It defines PSFAST_NAMESPACE, PSFAST_BYTES (of a
// vector), PSFAST_VECTORS (of a wide tile) and PSFAST_OUTPUTS (of the micro-kernel) before.

#define PSFAST_INLINE inline __attribute__((always_inline))

namespace psfast {
namespace PSFAST_NAMESPACE {
namespace {
#include "lanes.h"
#include "multiply.h"
#include "evaluate.h"
#include "starts.h"
#include "prepare.h"

template <class R>
void evaluate(const Context<R>& c, const Trial<R>* trials, const Group& group,
              const Stream* streams, double* diff) {
  const int n = static_cast<int>(group.end - group.begin);
  if (n <= Lanes<R>::W) Tile<R, 1>(c, trials).evaluate(group, streams, n, diff);
  else Tile<R, PSFAST_VECTORS>(c, trials).evaluate(group, streams, n, diff);
}

template <class R>
void refresh(const Context<R>& c, int64_t layer, bool behind_attention, int64_t b0, int n,
             bool keep_all) {
  Tile<R, 1>(c, nullptr).refresh(layer, behind_attention, b0, n, keep_all);
}
}  // namespace

template <class R>
Evaluator<R> evaluator() {
  return {Lanes<R>::W,      PSFAST_VECTORS * Lanes<R>::W, evaluate<R>, refresh<R>,
          attend_inputs<R>, prepare<R>,                   prepare_again<R>};
}
template Evaluator<float> evaluator<float>();
template Evaluator<double> evaluator<double>();
}  // namespace PSFAST_NAMESPACE
}  // namespace psfast
