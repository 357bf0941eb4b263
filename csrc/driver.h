// Plans a block of trial points, and runs the plan and the refresh on torch's threads.
#pragma once

#include "evaluator.h"

namespace psfast {

// The losses of trial points: losses[k] at weights[index[k]] + delta[k], else as they are.
template <class R>
void losses(const Context<R>& c, const int64_t* index, const R* delta, int64_t K, double* losses);

// Prepares weights and the incumbent's activations again after the coordinates `changed` were
// written; all of them for changed = nullptr.
template <class R>
void refresh(const Context<R>& c, const int64_t* changed, int64_t count);

template <class R>
double incumbent_loss(const Context<R>& c);

// The loss at the weights as they are, with the bits of a refresh of everything. The workspace
// serves to work in: what it holds afterwards is no incumbent's.
template <class R>
double loss_from_scratch(const Context<R>& c);

}  // namespace psfast
