// Sizes of the model, where each number lies in the weights and in the workspace, and trial points.
//
// The weights are one buffer in the order of `model.parameters()`:
//   position_embedding, token_embedding,
//   per layer ln1 (w, b), qkv (w, b), out (w, b), ln2 (w, b), ff1 (w, b), ff2 (w, b),
//   final_norm (w, b), head (w, b).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace psfast {

constexpr int64_t kBlock = 8;  // outputs of a linear map that the micro-kernel makes at once

inline int64_t round_up(int64_t n) { return (n + kBlock - 1) / kBlock * kBlock; }

struct Sizes {
  int64_t B, T, V, D, L, H, F, max_len, ignore_index;
  double eps;

  int64_t dk() const { return D / H; }
  int64_t dk_padded() const { return round_up(dk()); }
  int64_t rows() const { return B * T; }
};

// Offsets of the tensors of one layer in the weights.
struct LayerWeights {
  int64_t ln1_w, ln1_b, qkv_w, qkv_b, out_w, out_b, ln2_w, ln2_b, ff1_w, ff1_b, ff2_w, ff2_b;
};

struct WeightMap {
  explicit WeightMap(const Sizes& s);
  int64_t positions, tokens, final_w, final_b, head_w, head_b, total;
  std::vector<LayerWeights> layers;
};

// A LayerNorm folded into the linear map behind it: map(ln(x)) = rstd * (W' (x - mean)) + b'.
// N is padded to whole blocks (qkv: each head's q, k and v separately), K = D.
struct Fold {
  int64_t N;
  size_t pack;     // [N / kBlock][D][kBlock]: W' = W diag(gain), for the micro-kernel
  size_t bias;     // [N]: b' = b + W shift
  size_t centred;  // [D][N]: W' with the mean of each row taken off, transposed
  size_t product;  // qkv and head: centred W' times the ff2 before it, [F][N];
                   // ff1: centred W' times this layer's out, packed as `pack` is
};

// What is kept of one layer: prepared weights, and the incumbent's activations by row (b, t).
struct LayerSpace {
  Fold qkv, ff1;
  size_t out_pack, ff2_pack;
  size_t x;       // [rows][D]: the layer's input
  size_t xhat1;   // [rows][D]: normalised, before gain and shift
  size_t qkv_raw; // [rows][N]: before rstd and bias
  size_t qkv_out; // [rows][N]
  size_t scores;  // [B][H][T][T]: scaled, before softmax
  size_t probs;   // [B][H][T][T]
  size_t attended;  // [B][H][T][D]: probs times the layer's normalised input
  size_t mixed;   // [rows][D]: attention's output before `out`
  size_t y;       // [rows][D]: the residual stream behind attention
  size_t xhat2;   // [rows][D]
  size_t ff_raw;  // [rows][F padded]: before rstd and bias
  size_t ff_pre;  // [rows][F padded]: before ReLU
};

struct Layout {
  explicit Layout(const Sizes& s, size_t element_size);
  size_t row_loss;  // double [1 + 2 rows]: the summed loss, then by row max - target's logit and
                    // the sum of exp(logit - max)
  std::vector<LayerSpace> layers;
  Fold head;
  size_t x, xhat, logits_raw, logits;  // behind the last layer, by row
  size_t total;                        // elements
};

enum class Kind : uint8_t {
  none, token, position, ln1_w, ln1_b, qkv_w, qkv_b, out_w, out_b, ln2_w, ln2_b,
  ff1_w, ff1_b, ff2_w, ff2_b, final_w, final_b, head_w, head_b,
};

// One changed coordinate: element (row, col) of the tensor `kind` of `layer`.
struct Coordinate {
  Kind kind;
  int32_t layer, row, col;
};

Coordinate locate(const Sizes& s, const WeightMap& map, int64_t index);

// Where the evaluation of a trial point starts: everything before is the incumbent's.
enum class Entry : uint8_t {
  stream,        // a rank-1 change of the residual stream before a layer, product prepared
  stream_plain,  // the same without a prepared product (a dropout mask lies between)
  qkv,           // a rank-1 change of q, k and v (ln1)
  scores,        // a rank-1 change of one head's scores (a row of q or k)
  attention,     // a rank-1 change of the residual stream behind attention (v, out)
  hidden,        // a rank-1 change before ReLU (ln2)
  logits,        // a rank-1 change of the logits (final_norm)
  head,          // one logit: closed form
  noop,          // the loss cannot change
};

// A sequence `b` as one trial point sees it; rows before `t0` are the incumbent's.
struct Stream {
  int32_t trial, b, t0;
};

// Streams [begin, end) that start alike and are evaluated together.
struct Group {
  Entry entry;
  int32_t layer, head;
  int64_t begin, end;
};

// Facts of the batch that pruning needs.
struct Batch {
  Batch(const Sizes& s, const int64_t* tokens, const int64_t* targets);
  std::vector<int32_t> length;      // [B]: 1 + the last supervised position, else 0
  std::vector<uint8_t> supervised;  // [B][T]
  std::vector<uint8_t> read;        // [V]: the token stands at a position that counts
  int64_t count;                    // supervised positions
};

template <class R>
struct Trial {
  Coordinate at;
  Entry entry;
  R delta;
};

template <class R>
struct Context {
  Sizes s;
  const WeightMap* map;
  const Layout* layout;
  const Batch* batch;
  const R* weights;
  const R* mask;  // [L][B][T][D], or null
  const int64_t* tokens;
  const int64_t* targets;
  R* space;

  const R* w(int64_t offset) const { return weights + offset; }
  R* at(size_t offset) const { return space + offset; }
  double* total_loss() const { return reinterpret_cast<double*>(space + layout->row_loss); }
  double* row_shift() const { return total_loss() + 1; }
  double* row_sum() const { return row_shift() + s.rows(); }
};

// The row of a padded qkv map for `row` of the weight (rows grouped by head, then q, k, v).
inline int64_t qkv_padded(const Sizes& s, int64_t row) {
  return row / s.dk() * s.dk_padded() + row % s.dk();
}

// How the change at `trial` shows in row (b, t): the coefficient of its rank-1 term.
template <class R>
R coefficient(const Context<R>& c, const Trial<R>& trial, int64_t b, int64_t t);

template <class R>
Entry entry_of(const Context<R>& c, const Coordinate& at);

// The first row of sequence b that the trial changes, -1 if none that counts.
template <class R>
int32_t first_row(const Context<R>& c, const Trial<R>& trial, int64_t b);

}  // namespace psfast
