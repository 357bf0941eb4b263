// The ops of psfast._C, on torch's stable ABI. Their Python side is psfast/ops.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <tuple>

#include "driver.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(const Tensor& t, const char* name, ScalarType dtype, int64_t dim) {
  STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " has the wrong dtype");
  STD_TORCH_CHECK(t.dim() == dim, name, " must have ", dim, " dimensions, got ", t.dim());
}

// sizes: V, d_model, n_layers, n_heads, d_ff, max_len, ignore_index
psfast::Sizes read_sizes(const std::vector<int64_t>& v, int64_t B, int64_t T, double eps) {
  STD_TORCH_CHECK(v.size() == 7, "sizes must hold 7 numbers, got ", v.size());
  psfast::Sizes s{B, T, v[0], v[1], v[2], v[3], v[4], v[5], v[6], eps};
  for (int i = 0; i < 6; ++i)
    STD_TORCH_CHECK(v[i] >= 1 && v[i] < (int64_t(1) << 31), "sizes[", i,
                    "] must be at least 1, got ", v[i]);
  STD_TORCH_CHECK(s.D % s.H == 0, "d_model must be divisible by n_heads, got ", s.D, " and ", s.H);
  STD_TORCH_CHECK(B >= 1 && T >= 1 && T <= s.max_len,
                  "tokens must have B >= 1 and 1 <= T <= max_len, got B = ", B, ", T = ", T);
  return s;
}

// Everything that an evaluation reads, checked once a call.
template <class R>
struct Problem {
  psfast::Sizes sizes;
  psfast::WeightMap map;
  psfast::Layout layout;
  psfast::Batch batch;
  psfast::Context<R> context;

  Problem(const psfast::Sizes& s, const Tensor& weights, const Tensor& tokens,
          const Tensor& targets, const std::optional<Tensor>& mask, const Tensor& workspace)
      : sizes(s), map(s), layout(s, sizeof(R)),
        batch(checked(s, tokens, targets)),
        context{sizes, &map, &layout, &batch, static_cast<const R*>(weights.data_ptr()),
                mask ? static_cast<const R*>(mask->data_ptr()) : nullptr,
                static_cast<const int64_t*>(tokens.data_ptr()),
                static_cast<const int64_t*>(targets.data_ptr()),
                static_cast<R*>(workspace.data_ptr())} {
    STD_TORCH_CHECK(weights.numel() == map.total, "weights must hold ", map.total,
                    " numbers, got ", weights.numel());
    STD_TORCH_CHECK(workspace.numel() == static_cast<int64_t>(layout.total),
                    "workspace must hold ", layout.total, " numbers, got ", workspace.numel());
    STD_TORCH_CHECK(!mask || mask->numel() == s.L * s.rows() * s.D,
                    "mask must have shape (n_layers, B, T, d_model)");
  }

  static psfast::Batch checked(const psfast::Sizes& s, const Tensor& tokens,
                               const Tensor& targets) {
    STD_TORCH_CHECK(targets.size(0) == s.B && targets.size(1) == s.T,
                    "targets must have the shape of tokens");
    const auto* token = static_cast<const int64_t*>(tokens.data_ptr());
    const auto* target = static_cast<const int64_t*>(targets.data_ptr());
    for (int64_t i = 0; i < s.rows(); ++i) {
      STD_TORCH_CHECK(token[i] >= 0 && token[i] < s.V, "tokens must lie in [0, ", s.V, "), got ",
                      token[i]);
      STD_TORCH_CHECK(target[i] == s.ignore_index || (target[i] >= 0 && target[i] < s.V),
                      "targets must be ignore_index or lie in [0, ", s.V, "), got ", target[i]);
    }
    return psfast::Batch(s, token, target);
  }
};

void check_index(const Tensor& index, const char* name, int64_t N) {
  check(index, name, ScalarType::Long, 1);
  const auto* i = static_cast<const int64_t*>(index.data_ptr());
  for (int64_t k = 0; k < index.numel(); ++k)
    STD_TORCH_CHECK(i[k] >= 0 && i[k] < N, name, " must lie in [0, ", N, "), got ", i[k]);
}

void check_block(const Tensor& index, const Tensor& delta, const Tensor& weights) {
  check_index(index, "index", weights.numel());
  check(delta, "delta", weights.scalar_type(), 1);
  STD_TORCH_CHECK(index.numel() == delta.numel(), "index and delta must have the same length, got ",
                  index.numel(), " and ", delta.numel());
}

template <class Run>
void with_problem(const Tensor& weights, const Tensor& tokens, const Tensor& targets,
                  const std::optional<Tensor>& mask, const Tensor& workspace,
                  const std::vector<int64_t>& sizes, double eps, Run run) {
  const ScalarType dtype = weights.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "weights must be float32 or float64");
  check(weights, "weights", dtype, 1);
  check(workspace, "workspace", dtype, 1);
  check(tokens, "tokens", ScalarType::Long, 2);
  check(targets, "targets", ScalarType::Long, 2);
  if (mask) check(*mask, "mask", dtype, 4);
  const psfast::Sizes s = read_sizes(sizes, tokens.size(0), tokens.size(1), eps);
  if (dtype == ScalarType::Float)
    run(Problem<float>(s, weights, tokens, targets, mask, workspace).context);
  else
    run(Problem<double>(s, weights, tokens, targets, mask, workspace).context);
}

int64_t fused_workspace_size(std::vector<int64_t> sizes, int64_t B, int64_t T,
                             int64_t element_size) {
  STD_TORCH_CHECK(element_size == 4 || element_size == 8, "element_size must be 4 or 8, got ",
                  element_size);
  return psfast::Layout(read_sizes(sizes, B, T, 0), element_size).total;
}

Tensor fused_refresh(Tensor weights, Tensor tokens, Tensor targets, std::optional<Tensor> mask,
                     Tensor workspace, std::vector<int64_t> sizes, double eps,
                     std::optional<Tensor> changed, bool same_batch) {
  Tensor loss = torch::stable::new_empty(weights, {}, ScalarType::Double);
  with_problem(weights, tokens, targets, mask, workspace, sizes, eps, [&](const auto& c) {
    if (changed) check_index(*changed, "changed", weights.numel());
    psfast::refresh(c, changed ? static_cast<const int64_t*>(changed->data_ptr()) : nullptr,
                    changed ? changed->numel() : 0, same_batch);
    *static_cast<double*>(loss.data_ptr()) = psfast::incumbent_loss(c);
  });
  return loss;
}

Tensor fused_loss(Tensor weights, Tensor tokens, Tensor targets, std::optional<Tensor> mask,
                  Tensor workspace, std::vector<int64_t> sizes, double eps) {
  Tensor loss = torch::stable::new_empty(weights, {}, ScalarType::Double);
  with_problem(weights, tokens, targets, mask, workspace, sizes, eps, [&](const auto& c) {
    *static_cast<double*>(loss.data_ptr()) = psfast::loss_from_scratch(c);
  });
  return loss;
}

Tensor fused_losses(Tensor weights, Tensor tokens, Tensor targets, std::optional<Tensor> mask,
                    Tensor workspace, std::vector<int64_t> sizes, double eps, Tensor index,
                    Tensor delta) {
  check_block(index, delta, weights);
  Tensor losses = torch::stable::new_empty(weights, {index.numel()}, ScalarType::Double);
  with_problem(weights, tokens, targets, mask, workspace, sizes, eps, [&](const auto& c) {
    using R = std::remove_cv_t<std::remove_pointer_t<decltype(c.space)>>;
    psfast::losses(c, static_cast<const int64_t*>(index.data_ptr()),
                   static_cast<const R*>(delta.data_ptr()), index.numel(),
                   static_cast<double*>(losses.data_ptr()));
  });
  return losses;
}

// losses (K,), places (K,), incumbents (K,), then how many of them count: decided, accepted, and
// the trial points evaluated.
std::tuple<Tensor, Tensor, Tensor, Tensor> fused_descend(
    Tensor weights, Tensor tokens, Tensor targets, std::optional<Tensor> mask, Tensor workspace,
    std::vector<int64_t> sizes, double eps, Tensor index, Tensor delta, double incumbent,
    double margin, int64_t most, double gap) {
  check_block(index, delta, weights);
  STD_TORCH_CHECK(gap > 0, "gap must be positive, got ", gap);
  const int64_t K = index.numel();
  Tensor losses = torch::stable::new_empty(weights, {K}, ScalarType::Double);
  Tensor places = torch::stable::new_empty(weights, {K}, ScalarType::Long);
  Tensor incumbents = torch::stable::new_empty(weights, {K}, ScalarType::Double);
  Tensor counts = torch::stable::new_empty(weights, {3}, ScalarType::Long);
  with_problem(weights, tokens, targets, mask, workspace, sizes, eps, [&](const auto& c) {
    using R = std::remove_cv_t<std::remove_pointer_t<decltype(c.space)>>;
    const psfast::Descent d = psfast::descend(
        c, static_cast<R*>(weights.data_ptr()), static_cast<const int64_t*>(index.data_ptr()),
        static_cast<const R*>(delta.data_ptr()), K, incumbent, margin, most, gap,
        static_cast<double*>(losses.data_ptr()), static_cast<int64_t*>(places.data_ptr()),
        static_cast<double*>(incumbents.data_ptr()));
    auto* count = static_cast<int64_t*>(counts.data_ptr());
    count[0] = d.decided, count[1] = d.accepted, count[2] = d.evaluated;
  });
  return {losses, places, incumbents, counts};
}

// Which sources this library was built from, for psfast/extension.py to find in its bytes.
#ifdef PSFAST_SOURCES
__attribute__((used)) const char sources[] = PSFAST_SOURCES;
#endif

std::string instruction_set() { return psfast::instruction_set(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(psfast, m) {
  m.def("fused_workspace_size(int[] sizes, int B, int T, int element_size) -> int");
  m.def("instruction_set() -> str");
  m.def(
      "fused_refresh(Tensor weights, Tensor tokens, Tensor targets, Tensor? mask, "
      "Tensor(a!) workspace, int[] sizes, float eps, Tensor? changed, "
      "bool same_batch) -> Tensor");
  m.def(
      "fused_loss(Tensor weights, Tensor tokens, Tensor targets, Tensor? mask, "
      "Tensor(a!) workspace, int[] sizes, float eps) -> Tensor");
  m.def(
      "fused_losses(Tensor weights, Tensor tokens, Tensor targets, Tensor? mask, "
      "Tensor workspace, int[] sizes, float eps, Tensor index, Tensor delta) -> Tensor");
  m.def(
      "fused_descend(Tensor(a!) weights, Tensor tokens, Tensor targets, Tensor? mask, "
      "Tensor(b!) workspace, int[] sizes, float eps, Tensor index, Tensor delta, "
      "float incumbent, float margin, int most, float gap) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(psfast, CompositeExplicitAutograd, m) {
  m.impl("fused_workspace_size", TORCH_BOX(&fused_workspace_size));
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
}

STABLE_TORCH_LIBRARY_IMPL(psfast, CPU, m) {
  m.impl("fused_refresh", TORCH_BOX(&fused_refresh));
  m.impl("fused_loss", TORCH_BOX(&fused_loss));
  m.impl("fused_losses", TORCH_BOX(&fused_losses));
  m.impl("fused_descend", TORCH_BOX(&fused_descend));
}
