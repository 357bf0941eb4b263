// Plans a block of trial points, and runs the plan and the refresh on torch's threads.
#pragma once

#include "evaluator.h"

namespace psfast {

// The losses of trial points: losses[k] at weights[index[k]] + delta[k], else as they are.
template <class R>
void losses(const Context<R>& c, const int64_t* index, const R* delta, int64_t K, double* losses);

// What `descend` did: trial points decided, accepted and evaluated.
struct Descent {
  int64_t decided, accepted, evaluated;
};

// The serial loop over K trial points: each whose loss is below the incumbent's by more than
// `margin` becomes the incumbent, in `weights` (those of c) and in the workspace; ends behind
// accepted trial point number `most`. losses [K]: of the decided ones; places, incumbents [K]: of
// the accepted ones and the loss after each. gap: trial points between two of them, about; it says
// how many to evaluate together and changes nothing else.
template <class R>
Descent descend(const Context<R>& c, R* weights, const int64_t* index, const R* delta, int64_t K,
                double incumbent, double margin, int64_t most, double gap, double* losses,
                int64_t* places, double* incumbents);

// Prepares weights and the incumbent's activations again after the coordinates `changed` were
// written; all of them for changed = nullptr. Unless it is the `same_batch` as before, with its
// mask, all activations.
template <class R>
void refresh(const Context<R>& c, const int64_t* changed, int64_t count, bool same_batch);

template <class R>
double incumbent_loss(const Context<R>& c);

// The loss at the weights as they are, with the bits of a refresh of everything. The workspace
// serves to work in: what it holds afterwards is no incumbent's.
template <class R>
double loss_from_scratch(const Context<R>& c);

}  // namespace psfast
