#include "driver.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <string>
#include <utility>

namespace psfast {
namespace {

// work(i) for i in [0, n) on torch's threads, handed out one by one in that order.
template <class Work>
void on_threads(int64_t n, Work work) {
  const int64_t threads = std::min<int64_t>(n, torch::stable::get_num_threads());
  if (threads <= 1) {
    for (int64_t i = 0; i < n; ++i) work(i);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin)
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) work(i);
  });
}

// How many of n sequences to evaluate together: all threads get some, and lanes are not left
// over. (A tile with few sequences gives each several lanes.)
int64_t share(int64_t n, int narrow, int wide) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t each = (n + threads - 1) / threads;
  if (each > narrow) return wide;
  int64_t step = 1;
  while (step < each) step *= 2;
  return std::min<int64_t>(step, narrow);
}

constexpr int64_t kLayerBits = 24, kHeadBits = 16;

// Trial points with one key start alike. Keys ascend with the layer: the dearest come first.
template <class R>
uint64_t key_of(const Context<R>& c, const Trial<R>& t) {
  int64_t layer = t.at.layer, head = 0;
  const bool from_ff = t.at.kind >= Kind::ff1_w && t.at.kind <= Kind::ff2_b;
  if ((t.entry == Entry::stream || t.entry == Entry::stream_plain) && from_ff) ++layer;
  if (t.entry == Entry::scores) head = t.at.row / (3 * c.s.dk());
  if (t.at.kind == Kind::position) head = t.at.row;  // later positions leave more untouched
  return static_cast<uint64_t>(layer) << kLayerBits | static_cast<uint64_t>(t.entry) << kHeadBits |
         static_cast<uint64_t>(std::min<int64_t>(head, (1 << kHeadBits) - 1));
}

// Groups of at most `step` streams each.
std::vector<Group> cut(const std::vector<Group>& whole, int64_t step) {
  std::vector<Group> parts;
  for (Group part : whole)
    for (const int64_t end = part.end; part.begin < end; part.begin = part.end) {
      part.end = std::min(end, part.begin + step);
      parts.push_back(part);
    }
  return parts;
}

// The change of one logit's row in closed form:
// log(sum - e^l + e^(l + d)) - log(sum) = log(1 + p (e^d - 1)) with p = e^l / sum.
template <class R>
double head_change(const Context<R>& c, const Trial<R>& t) {
  const Sizes& s = c.s;
  const Layout& a = *c.layout;
  const R *gain = c.w(c.map->final_w), *shift = c.w(c.map->final_b);
  double change = 0;
  for (int64_t row = 0; row < s.rows(); ++row) {
    if (!c.batch->supervised[row]) continue;
    double d = t.delta;
    if (t.at.kind == Kind::head_w)
      d *= c.at(a.xhat)[row * s.D + t.at.col] * gain[t.at.col] + shift[t.at.col];
    const R* logits = c.at(a.logits) + row * a.head.N;
    const double target = logits[c.targets[row]];
    const double top = c.row_shift()[row] + target;
    const double p = std::exp(logits[t.at.row] - top) / c.row_sum()[row];
    if (d > 30) {  // from the new top on: where p is 0 and e^-d is, too, their sum has no logarithm
      const double raised = logits[t.at.row] + d - top, rise = std::max(raised, 0.0);
      change += rise + std::log((1 - p) * std::exp(-rise) +
                                std::exp(raised - rise) / c.row_sum()[row]);
    } else if (d < -1 && p > 0.5) {  // what is left is the others' sum, which 1 - p has lost
      const double lowered = logits[t.at.row] + d;
      double next = lowered, left = 0;
      for (int64_t n = 0; n < s.V; ++n)
        if (n != t.at.row) next = std::max(next, double(logits[n]));
      for (int64_t n = 0; n < s.V; ++n)
        left += std::exp((n == t.at.row ? lowered : logits[n]) - next);
      change += next - top + std::log(left / c.row_sum()[row]);
    } else {
      change += std::log1p(p * std::expm1(d));
    }
    if (t.at.row == c.targets[row]) change -= d;
  }
  return change;
}

// All sequences from one layer on, and the sum of their losses.
template <class R>
void run_incumbent(const Context<R>& c, int64_t layer, bool behind_attention, bool keep_all) {
  const Sizes& s = c.s;
  const Evaluator<R>& run = evaluator<R>();
  const int64_t step = share(s.B, run.narrow, run.narrow);
  on_threads((s.B + step - 1) / step, [&](int64_t i) {
    run.refresh(c, layer, behind_attention, i * step,
                static_cast<int>(std::min(step, s.B - i * step)), keep_all);
  });
  double total = 0;
  for (int64_t row = 0; row < s.rows(); ++row)
    if (c.batch->supervised[row]) total += c.row_shift()[row] + std::log(c.row_sum()[row]);
  *c.total_loss() = total;
}

}  // namespace

template <class R>
double incumbent_loss(const Context<R>& c) {
  return *c.total_loss() / static_cast<double>(c.batch->count);
}

template <class R>
void losses(const Context<R>& c, const int64_t* index, const R* delta, int64_t K, double* out) {
  const Sizes& s = c.s;
  const Evaluator<R>& run = evaluator<R>();

  // 1. Where each trial point starts, and which sequences it changes.
  std::vector<Trial<R>> trials(K);
  std::vector<int32_t> starts(K * s.B, -1);
  constexpr int64_t kChunk = 64;
  on_threads((K + kChunk - 1) / kChunk, [&](int64_t chunk) {
    for (int64_t k = chunk * kChunk; k < std::min(K, (chunk + 1) * kChunk); ++k) {
      Trial<R>& t = trials[k];
      t.at = locate(s, *c.map, index[k]);
      const R value = c.weights[index[k]], moved = value + delta[k];
      t.delta = moved - value;
      t.entry = moved == value || !c.batch->count ? Entry::noop : entry_of(c, t.at);
      if (t.entry == Entry::noop || t.entry == Entry::head) continue;
      for (int64_t b = 0; b < s.B; ++b) starts[k * s.B + b] = first_row(c, t, b);
    }
  });

  // 2. Streams that start alike side by side, the same sequence together.
  std::vector<std::pair<uint64_t, int32_t>> order;
  order.reserve(K);
  for (int64_t k = 0; k < K; ++k)
    if (trials[k].entry != Entry::noop)
      order.emplace_back(key_of(c, trials[k]), static_cast<int32_t>(k));
  std::sort(order.begin(), order.end());
  std::vector<Stream> streams;
  std::vector<Group> groups;
  for (size_t begin = 0, end; begin < order.size(); begin = end) {
    end = begin;
    while (end < order.size() && order[end].first == order[begin].first) ++end;
    const Trial<R>& t = trials[order[begin].second];
    if (t.entry == Entry::head) {
      groups.push_back({Entry::head, 0, 0, static_cast<int64_t>(begin), static_cast<int64_t>(end)});
      continue;
    }
    const int64_t from = streams.size();
    for (int32_t b = 0; b < s.B; ++b)
      for (size_t i = begin; i < end; ++i) {
        const int32_t k = order[i].second;
        if (starts[k * s.B + b] >= 0) streams.push_back({k, b, starts[k * s.B + b]});
      }
    const int64_t to = streams.size();
    const int32_t head = t.entry == Entry::scores ? t.at.row / (3 * s.dk()) : 0;
    groups.push_back(
        {t.entry, static_cast<int32_t>(order[begin].first >> kLayerBits), head, from, to});
  }
  groups = cut(groups, share(streams.size(), run.narrow, run.wide));

  // 3. The groups; each stream's change goes to its own place.
  std::vector<double> change(K * s.B, 0.0);
  on_threads(groups.size(), [&](int64_t i) {
    const Group& group = groups[i];
    if (group.entry == Entry::head) {
      for (int64_t j = group.begin; j < group.end; ++j) {
        const int32_t k = order[j].second;
        change[k * s.B] = head_change(c, trials[k]);
      }
      return;
    }
    double diff[256];
    const Stream* first = streams.data() + group.begin;
    run.evaluate(c, trials.data(), group, first, diff);
    for (int64_t j = 0; j < group.end - group.begin; ++j)
      change[first[j].trial * s.B + first[j].b] = diff[j];
  });

  // 4. One loss a trial point, its sequences added in their order.
  const double total = *c.total_loss(), count = static_cast<double>(c.batch->count);
  for (int64_t k = 0; k < K; ++k) {
    double sum = 0;
    for (int64_t b = 0; b < s.B; ++b) sum += change[k * s.B + b];
    out[k] = (total + sum) / count;
  }
}

template <class R>
void refresh(const Context<R>& c, const int64_t* changed, int64_t count, bool same_batch) {
  const Sizes& s = c.s;
  const Evaluator<R>& run = evaluator<R>();
  int64_t layer = 0;
  bool behind_attention = false;
  if (changed) {
    int64_t from = same_batch ? 2 * s.L + 1 : 0;  // in half layers
    for (int64_t i = 0; i < count; ++i) {
      const Coordinate at = locate(s, *c.map, changed[i]);
      const bool embedding = at.kind == Kind::token || at.kind == Kind::position;
      if (embedding && entry_of(c, at) == Entry::noop) continue;  // a row that nothing reads
      run.prepare_again(c, at);
      const bool late = at.kind >= Kind::ln2_w && at.kind <= Kind::ff2_b;
      from = std::min<int64_t>(from, 2 * at.layer + late);
    }
    if (from > 2 * s.L) return;
    layer = from / 2;
    behind_attention = from % 2;
  } else {
    on_threads(s.L + 1, [&](int64_t l) { run.prepare(c, l, true); });
  }
  run_incumbent(c, layer, behind_attention, true);
  const int64_t first = layer + behind_attention;
  on_threads((s.L - first) * s.B,
             [&](int64_t i) { run.attend_inputs(c, first + i / s.B, i % s.B); });
}

template <class R>
Descent descend(const Context<R>& c, R* weights, const int64_t* index, const R* delta, int64_t K,
                double incumbent, double margin, int64_t most, double gap, double* out,
                int64_t* places, double* incumbents) {
  Descent d{0, 0, 0};
  int64_t tried = 0;
  while (d.decided < K && d.accepted < most) {
    // As psfast/search.py's block_size, for the small gaps that descents are for.
    const int64_t few = std::max<int64_t>({1, std::llround(std::min(0.8 * gap, 1e4)), tried / 4});
    const int64_t size = std::min(few, K - d.decided);
    losses(c, index + d.decided, delta + d.decided, size, out + d.decided);
    d.evaluated += size;
    const double bar = std::isfinite(incumbent) ? incumbent - margin : HUGE_VAL;
    for (const int64_t end = d.decided + size; d.decided < end;) {
      const int64_t k = d.decided++;
      ++tried;
      if (!(out[k] < bar) || out[k] == -HUGE_VAL) continue;
      weights[index[k]] += delta[k];
      refresh(c, index + k, 1, true);
      incumbent = incumbent_loss(c);
      places[d.accepted] = k;
      incumbents[d.accepted++] = incumbent;
      gap = 0.7 * gap + 0.3 * static_cast<double>(tried);
      tried = 0;
      break;
    }
  }
  return d;
}

template <class R>
double loss_from_scratch(const Context<R>& c) {
  const Evaluator<R>& run = evaluator<R>();
  on_threads(c.s.L + 1, [&](int64_t l) { run.prepare(c, l, false); });
  run_incumbent(c, 0, false, false);
  return incumbent_loss(c);
}

#define PSFAST_INSTANTIATE(R)                                                        \
  template double incumbent_loss<R>(const Context<R>&);                                   \
  template double loss_from_scratch<R>(const Context<R>&);                                \
  template void losses<R>(const Context<R>&, const int64_t*, const R*, int64_t, double*); \
  template Descent descend<R>(const Context<R>&, R*, const int64_t*, const R*, int64_t, double, \
                              double, int64_t, double, double*, int64_t*, double*);       \
  template void refresh<R>(const Context<R>&, const int64_t*, int64_t, bool);
PSFAST_INSTANTIATE(float)
PSFAST_INSTANTIATE(double)

namespace {
enum class Isa { portable, avx2, avx512 };

Isa choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  const char* limit = std::getenv("PSFAST_ISA");  // for tests and measurements
  const std::string most = limit ? limit : "avx512";
  if (avx2 && avx512 && most == "avx512") return Isa::avx512;
  if (avx2 && most != "portable") return Isa::avx2;
#endif
  return Isa::portable;
}

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}
}  // namespace

const char* instruction_set() {
  return isa() == Isa::avx512 ? "avx512" : isa() == Isa::avx2 ? "avx2" : "portable";
}

template <class R>
const Evaluator<R>& evaluator() {
  static const Evaluator<R> chosen =
#if defined(__x86_64__)
      isa() == Isa::avx512 ? avx512::evaluator<R>() : isa() == Isa::avx2 ? avx2::evaluator<R>() :
#endif
      portable::evaluator<R>();
  return chosen;
}
template const Evaluator<float>& evaluator<float>();
template const Evaluator<double>& evaluator<double>();

}  // namespace psfast
