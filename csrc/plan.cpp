#include "plan.h"

#include <utility>

namespace psfast {

WeightMap::WeightMap(const Sizes& s) {
  int64_t next = 0;
  auto take = [&next](int64_t n) { return std::exchange(next, next + n); };
  positions = take(s.max_len * s.D);
  tokens = take(s.V * s.D);
  for (int64_t l = 0; l < s.L; ++l) {
    LayerWeights w;
    w.ln1_w = take(s.D);
    w.ln1_b = take(s.D);
    w.qkv_w = take(3 * s.D * s.D);
    w.qkv_b = take(3 * s.D);
    w.out_w = take(s.D * s.D);
    w.out_b = take(s.D);
    w.ln2_w = take(s.D);
    w.ln2_b = take(s.D);
    w.ff1_w = take(s.F * s.D);
    w.ff1_b = take(s.F);
    w.ff2_w = take(s.D * s.F);
    w.ff2_b = take(s.D);
    layers.push_back(w);
  }
  final_w = take(s.D);
  final_b = take(s.D);
  head_w = take(s.V * s.D);
  head_b = take(s.V);
  total = next;
}

Layout::Layout(const Sizes& s, size_t element_size) {
  size_t next = 0;
  auto take = [&](int64_t n) {  // each array starts on a cache line
    const size_t line = 64 / element_size;
    return std::exchange(next, next + (static_cast<size_t>(n) + line - 1) / line * line);
  };
  auto fold = [&](int64_t n, int64_t product_columns) {
    Fold f;
    f.N = n;
    f.pack = take(n * s.D);
    f.bias = take(n);
    f.centred = take(n * s.D);
    f.product = take(n * product_columns);
    return f;
  };
  const int64_t rows = s.rows(), nq = 3 * s.H * s.dk_padded(), nf = round_up(s.F);
  row_loss = take((1 + 2 * rows) * static_cast<int64_t>(sizeof(double) / element_size));
  for (int64_t l = 0; l < s.L; ++l) {
    LayerSpace a;
    a.qkv = fold(nq, l == 0 ? 0 : s.F);
    a.ff1 = fold(nf, s.D);
    a.out_pack = take(round_up(s.D) * s.D);
    a.ff2_pack = take(round_up(s.D) * s.F);
    a.x = take(rows * s.D);
    a.xhat1 = take(rows * s.D);
    a.qkv_raw = take(rows * nq);
    a.qkv_out = take(rows * nq);
    a.scores = take(s.B * s.H * s.T * s.T);
    a.probs = take(s.B * s.H * s.T * s.T);
    a.attended = take(s.B * s.H * s.T * s.D);
    a.mixed = take(rows * s.D);
    a.y = take(rows * s.D);
    a.xhat2 = take(rows * s.D);
    a.ff_raw = take(rows * nf);
    a.ff_pre = take(rows * nf);
    layers.push_back(a);
  }
  head = fold(round_up(s.V), s.F);
  x = take(rows * s.D);
  xhat = take(rows * s.D);
  logits_raw = take(rows * head.N);
  logits = take(rows * head.N);
  total = next;
}

Batch::Batch(const Sizes& s, const int64_t* tokens, const int64_t* targets)
    : length(s.B, 0), supervised(s.B * s.T, 0), read(s.V, 0), count(0) {
  for (int64_t b = 0; b < s.B; ++b) {
    for (int64_t t = 0; t < s.T; ++t) {
      if (targets[b * s.T + t] == s.ignore_index) continue;
      supervised[b * s.T + t] = 1;
      length[b] = static_cast<int32_t>(t + 1);
      ++count;
    }
    for (int64_t t = 0; t < length[b]; ++t) read[tokens[b * s.T + t]] = 1;
  }
}

Coordinate locate(const Sizes& s, const WeightMap& map, int64_t index) {
  auto make = [](Kind kind, int64_t layer, int64_t element, int64_t width) {
    return Coordinate{kind, static_cast<int32_t>(layer), static_cast<int32_t>(element / width),
                      static_cast<int32_t>(element % width)};
  };
  if (index < map.tokens) return make(Kind::position, 0, index, s.D);
  const int64_t first = map.layers[0].ln1_w;
  if (index < first) return make(Kind::token, 0, index - map.tokens, s.D);
  if (index >= map.head_b) return make(Kind::head_b, s.L, index - map.head_b, 1);
  if (index >= map.head_w) return make(Kind::head_w, s.L, index - map.head_w, s.D);
  if (index >= map.final_b) return make(Kind::final_b, s.L, index - map.final_b, 1);
  if (index >= map.final_w) return make(Kind::final_w, s.L, index - map.final_w, 1);
  const int64_t l = (index - first) / ((map.final_w - first) / s.L);
  const LayerWeights& w = map.layers[l];
  if (index >= w.ff2_b) return make(Kind::ff2_b, l, index - w.ff2_b, 1);
  if (index >= w.ff2_w) return make(Kind::ff2_w, l, index - w.ff2_w, s.F);
  if (index >= w.ff1_b) return make(Kind::ff1_b, l, index - w.ff1_b, 1);
  if (index >= w.ff1_w) return make(Kind::ff1_w, l, index - w.ff1_w, s.D);
  if (index >= w.ln2_b) return make(Kind::ln2_b, l, index - w.ln2_b, 1);
  if (index >= w.ln2_w) return make(Kind::ln2_w, l, index - w.ln2_w, 1);
  if (index >= w.out_b) return make(Kind::out_b, l, index - w.out_b, 1);
  if (index >= w.out_w) return make(Kind::out_w, l, index - w.out_w, s.D);
  if (index >= w.qkv_b) return make(Kind::qkv_b, l, index - w.qkv_b, 1);
  if (index >= w.qkv_w) return make(Kind::qkv_w, l, index - w.qkv_w, s.D);
  if (index >= w.ln1_b) return make(Kind::ln1_b, l, index - w.ln1_b, 1);
  return make(Kind::ln1_w, l, index - w.ln1_w, 1);
}

template <class R>
Entry entry_of(const Context<R>& c, const Coordinate& at) {
  const Sizes& s = c.s;
  const int64_t part = at.row / s.dk() % 3;  // of a qkv row: 0 query, 1 key, 2 value
  switch (at.kind) {
    case Kind::token: return c.batch->read[at.row] ? Entry::stream : Entry::noop;
    case Kind::position: return at.row < s.T ? Entry::stream : Entry::noop;
    case Kind::ln1_w:
    case Kind::ln1_b: return Entry::qkv;
    case Kind::qkv_w: return part == 2 ? Entry::attention : Entry::scores;
    // A key's bias shifts all scores of a query alike, which softmax does not see.
    case Kind::qkv_b:
      return part == 2 ? Entry::attention : part == 1 ? Entry::noop : Entry::scores;
    case Kind::out_w:
    case Kind::out_b: return Entry::attention;
    case Kind::ln2_w:
    case Kind::ln2_b: return Entry::hidden;
    case Kind::ff1_w:
    case Kind::ff1_b: return c.mask ? Entry::stream_plain : Entry::stream;
    case Kind::ff2_w:
    case Kind::ff2_b: return Entry::stream;
    case Kind::final_w:
    case Kind::final_b: return Entry::logits;
    case Kind::head_w:
    case Kind::head_b: return Entry::head;
    case Kind::none: break;
  }
  return Entry::noop;
}

template <class R>
R coefficient(const Context<R>& c, const Trial<R>& trial, int64_t b, int64_t t) {
  const Sizes& s = c.s;
  const Coordinate& at = trial.at;
  const int64_t row = b * s.T + t;
  const R delta = trial.delta;
  const bool inner = at.layer < s.L;
  const LayerSpace* a = inner ? &c.layout->layers[at.layer] : nullptr;
  const LayerWeights* w = inner ? &c.map->layers[at.layer] : nullptr;
  switch (at.kind) {
    case Kind::token: return c.tokens[row] == at.row ? delta : R(0);
    case Kind::position: return t == at.row ? delta : R(0);
    case Kind::ln1_w: return delta * c.at(a->xhat1)[row * s.D + at.row];
    case Kind::qkv_w: {
      const int64_t head = at.row / (3 * s.dk());
      return delta * c.at(a->attended)[((b * s.H + head) * s.T + t) * s.D + at.col];
    }
    case Kind::out_w: return delta * c.at(a->mixed)[row * s.D + at.col];
    case Kind::ln2_w: return delta * c.at(a->xhat2)[row * s.D + at.row];
    case Kind::ff1_w:
    case Kind::ff1_b: {
      const R pre = c.at(a->ff_pre)[row * a->ff1.N + at.row];
      R change = delta;
      if (at.kind == Kind::ff1_w) {
        const R xhat = c.at(a->xhat2)[row * s.D + at.col];
        change = delta * (xhat * c.w(w->ln2_w)[at.col] + c.w(w->ln2_b)[at.col]);
      }
      const R moved = pre + change;
      return (moved < R(0) ? R(0) : moved) - (pre < R(0) ? R(0) : pre);
    }
    case Kind::ff2_w:
    case Kind::ff2_b: {
      R g = delta;
      if (at.kind == Kind::ff2_w) {
        const R pre = c.at(a->ff_pre)[row * a->ff1.N + at.col];
        g = pre < R(0) ? R(0) : delta * pre;
      }
      if (c.mask) g *= c.mask[(at.layer * s.rows() + row) * s.D + at.row];
      return g;
    }
    case Kind::final_w: return delta * c.at(c.layout->xhat)[row * s.D + at.row];
    default: return delta;
  }
}

template <class R>
int32_t first_row(const Context<R>& c, const Trial<R>& trial, int64_t b) {
  const int32_t length = c.batch->length[b];
  switch (trial.at.kind) {
    case Kind::position: return trial.at.row < length ? trial.at.row : -1;
    case Kind::token:
    case Kind::ff1_w:
    case Kind::ff1_b:
    case Kind::ff2_w:
    case Kind::ff2_b: {
      const bool last = trial.at.kind != Kind::token && trial.at.layer == c.s.L - 1;
      const uint8_t* supervised = c.batch->supervised.data() + b * c.s.T;
      for (int32_t t = 0; t < length; ++t)
        if ((!last || supervised[t]) && coefficient(c, trial, b, t) != R(0)) return t;
      return -1;
    }
    // The first position attends to itself alone, whatever its score.
    default: return trial.entry == Entry::scores ? (length > 1 ? 1 : -1) : (length ? 0 : -1);
  }
}

#define PSFAST_INSTANTIATE(R)                                                           \
  template Entry entry_of<R>(const Context<R>&, const Coordinate&);                     \
  template R coefficient<R>(const Context<R>&, const Trial<R>&, int64_t, int64_t);      \
  template int32_t first_row<R>(const Context<R>&, const Trial<R>&, int64_t);
PSFAST_INSTANTIATE(float)
PSFAST_INSTANTIATE(double)

}  // namespace psfast
