// Prepares weights for the evaluator: folding, packing, products of neighbouring maps. Each
// number is made by one piece of code, so that preparing all and preparing what one accepted
// change touched give the same bits.
//
// Included by the evaluator's files inside their own namespace.

// The numbers of one block of outputs, at any address.
template <class R>
struct Outputs {
  typedef R V __attribute__((vector_size(kBlock * sizeof(R)), aligned(sizeof(R))));
};

// The block of outputs that holds `row` of the N rows of `weight`, which a folded map has from block
// `block` on: the rows side by side, as each sum of a row waits for the number before. Without
// `products`, not what they are of.
template <class R>
void fold_block(const Context<R>& c, const Fold& f, int64_t block, int64_t row, int64_t N,
                const R* weight, const R* bias, const R* gain, const R* shift, bool products) {
  typedef typename Outputs<R>::V V;
  typedef typename Outputs<double>::V Doubles;
  const int64_t D = c.s.D, first = row / kBlock * kBlock, count = std::min(kBlock, N - first);
  block += first / kBlock;
  // Padding stays zero.
  const auto put = [&](R* to, V values) {
    if (count == kBlock) *reinterpret_cast<V*>(to) = values;
    else for (int64_t i = 0; i < count; ++i) to[i] = values[i];
  };
  const R* rows[kBlock];
  Doubles mean = {}, offset = {};
  for (int64_t i = 0; i < kBlock; ++i) {
    const int64_t n = first + std::min(i, count - 1);
    rows[i] = weight + n * D;
    offset[i] = bias[n];
  }
  R* pack = c.at(f.pack) + block * D * kBlock;
  for (int64_t k = 0; k < D; ++k) {
    V w;
    for (int64_t i = 0; i < kBlock; ++i) w[i] = rows[i][k];
    const V folded = w * gain[k];
    put(pack + k * kBlock, folded);
    mean += __builtin_convertvector(folded, Doubles);
    offset += __builtin_convertvector(w, Doubles) * double(shift[k]);
  }
  put(c.at(f.bias) + block * kBlock, __builtin_convertvector(offset, V));
  if (!products) return;
  mean /= static_cast<double>(D);
  for (int64_t k = 0; k < D; ++k) {
    const V folded = *reinterpret_cast<const V*>(pack + k * kBlock);
    put(c.at(f.centred) + k * f.N + block * kBlock,
        __builtin_convertvector(__builtin_convertvector(folded, Doubles) - mean, V));
  }
}

// The products of centred W' with `other` [D][ld] for outputs n0 .. n0 + kBlock - 1 and columns
// [j0, j1): to[(j - j0) * step] holds kBlock numbers.
template <class R>
void multiply_centred(const Context<R>& c, const Fold& f, const R* other, int64_t ld, int64_t n0,
                      int64_t j0, int64_t j1, R* to, int64_t step) {
  typedef typename Outputs<R>::V V;
  constexpr int kColumns = 4;
  const R* centred = c.at(f.centred) + n0;
  for (int64_t j = j0; j < j1; j += kColumns) {
    V acc[kColumns] = {};
    const int64_t some = std::min<int64_t>(kColumns, j1 - j);
    for (int64_t k = 0; k < c.s.D; ++k) {
      const V w = *reinterpret_cast<const V*>(centred + k * f.N);
      for (int64_t i = 0; i < kColumns; ++i) acc[i] += w * other[k * ld + j + (i < some ? i : 0)];
    }
    for (int64_t i = 0; i < some; ++i)
      *reinterpret_cast<V*>(to + (j + i - j0) * step) = acc[i];
  }
}

// The product of ff1 of layer l with its `out`: blocks [n0, n1), columns [j0, j1).
template <class R>
void out_product(const Context<R>& c, int64_t l, int64_t n0, int64_t n1, int64_t j0, int64_t j1) {
  const Fold& f = c.layout->layers[l].ff1;
  for (int64_t n = n0; n < n1; ++n)
    multiply_centred(c, f, c.w(c.map->layers[l].out_w), c.s.D, n * kBlock, j0, j1,
                     c.at(f.product) + (n * c.s.D + j0) * kBlock, kBlock);
}

// The product of the map behind ff2 of layer l (the next layer's qkv, or head) with it.
template <class R>
void ff2_product(const Context<R>& c, int64_t l, int64_t n0, int64_t n1, int64_t j0, int64_t j1) {
  if (c.mask || l < 0) return;  // a mask lies between, or there is no layer before
  const Fold& f = l + 1 < c.s.L ? c.layout->layers[l + 1].qkv : c.layout->head;
  for (int64_t n = n0; n < n1; ++n)
    multiply_centred(c, f, c.w(c.map->layers[l].ff2_w), c.s.F, n * kBlock, j0, j1,
                     c.at(f.product) + j0 * f.N + n * kBlock, f.N);
}

template <class R>
void fold_qkv(const Context<R>& c, int64_t l, int64_t row, bool products) {
  const LayerWeights& w = c.map->layers[l];
  const int64_t dk = c.s.dk(), part = row / dk;
  fold_block(c, c.layout->layers[l].qkv, part * c.s.dk_padded() / kBlock, row % dk, dk,
             c.w(w.qkv_w) + part * dk * c.s.D, c.w(w.qkv_b) + part * dk, c.w(w.ln1_w),
             c.w(w.ln1_b), products);
}

template <class R>
void fold_ff1(const Context<R>& c, int64_t l, int64_t row, bool products) {
  const LayerWeights& w = c.map->layers[l];
  fold_block(c, c.layout->layers[l].ff1, 0, row, c.s.F, c.w(w.ff1_w), c.w(w.ff1_b), c.w(w.ln2_w),
             c.w(w.ln2_b), products);
}

template <class R>
void fold_head(const Context<R>& c, int64_t row, bool products) {
  const WeightMap& w = *c.map;
  fold_block(c, c.layout->head, 0, row, c.s.V, c.w(w.head_w), c.w(w.head_b), c.w(w.final_w),
             c.w(w.final_b), products);
}

template <class R>
void fold_all_qkv(const Context<R>& c, int64_t l, bool products) {
  for (int64_t part = 0; part < 3 * c.s.H; ++part)
    for (int64_t at = 0; at < c.s.dk(); at += kBlock)
      fold_qkv(c, l, part * c.s.dk() + at, products);
}

template <class R>
void fold_all_ff1(const Context<R>& c, int64_t l, bool products) {
  for (int64_t row = 0; row < c.s.F; row += kBlock) fold_ff1(c, l, row, products);
}

// Element (row, k) of a [N][K] weight within its pack [N / kBlock][K][kBlock].
inline int64_t packed(int64_t row, int64_t k, int64_t K) {
  return (row / kBlock * K + k) * kBlock + row % kBlock;
}

// All prepared weights of layer l, or of the head for l = L; without `products`, only what a loss
// from the first layer on needs. The workspace starts as zeros, so padding stays zero.
template <class R>
void prepare(const Context<R>& c, int64_t l, bool products) {
  const Sizes& s = c.s;
  if (l == s.L) {
    for (int64_t row = 0; row < s.V; row += kBlock) fold_head(c, row, products);
    if (products) ff2_product(c, l - 1, 0, c.layout->head.N / kBlock, 0, s.F);
    return;
  }
  const LayerSpace& a = c.layout->layers[l];
  const LayerWeights& w = c.map->layers[l];
  fold_all_qkv(c, l, products);
  fold_all_ff1(c, l, products);
  for (int64_t row = 0; row < s.D; ++row) {
    for (int64_t k = 0; k < s.D; ++k)
      c.at(a.out_pack)[packed(row, k, s.D)] = c.w(w.out_w)[row * s.D + k];
    for (int64_t k = 0; k < s.F; ++k)
      c.at(a.ff2_pack)[packed(row, k, s.F)] = c.w(w.ff2_w)[row * s.F + k];
  }
  if (!products) return;
  out_product(c, l, 0, a.ff1.N / kBlock, 0, s.D);
  ff2_product(c, l - 1, 0, a.qkv.N / kBlock, 0, s.F);
}

// What the change of one coordinate touches.
template <class R>
void prepare_again(const Context<R>& c, const Coordinate& at) {
  const Sizes& s = c.s;
  const int64_t l = at.layer;
  if (at.kind == Kind::final_w || at.kind == Kind::final_b) return prepare(c, s.L, true);
  if (at.kind == Kind::head_w || at.kind == Kind::head_b) {
    fold_head(c, at.row, true);
    return ff2_product(c, l - 1, at.row / kBlock, at.row / kBlock + 1, 0, s.F);
  }
  const LayerSpace& a = c.layout->layers[l];
  const LayerWeights& w = c.map->layers[l];
  switch (at.kind) {
    case Kind::ln1_w:
    case Kind::ln1_b:
      fold_all_qkv(c, l, true);
      return ff2_product(c, l - 1, 0, a.qkv.N / kBlock, 0, s.F);
    case Kind::qkv_w:
    case Kind::qkv_b: {
      fold_qkv(c, l, at.row, true);
      const int64_t block = qkv_padded(s, at.row) / kBlock;
      return ff2_product(c, l - 1, block, block + 1, 0, s.F);
    }
    case Kind::out_w:
      c.at(a.out_pack)[packed(at.row, at.col, s.D)] = c.w(w.out_w)[at.row * s.D + at.col];
      return out_product(c, l, 0, a.ff1.N / kBlock, at.col, at.col + 1);
    case Kind::ln2_w:
    case Kind::ln2_b:
      fold_all_ff1(c, l, true);
      return out_product(c, l, 0, a.ff1.N / kBlock, 0, s.D);
    case Kind::ff1_w:
    case Kind::ff1_b:
      fold_ff1(c, l, at.row, true);
      return out_product(c, l, at.row / kBlock, at.row / kBlock + 1, 0, s.D);
    case Kind::ff2_w: {
      c.at(a.ff2_pack)[packed(at.row, at.col, s.F)] = c.w(w.ff2_w)[at.row * s.F + at.col];
      const Fold& next = l + 1 < s.L ? c.layout->layers[l + 1].qkv : c.layout->head;
      return ff2_product(c, l, 0, next.N / kBlock, at.col, at.col + 1);
    }
    default: return;  // embeddings and the biases that are read where they lie
  }
}

// probs times the layer's normalised input, for sequence b: how much a row of v can change.
template <class R>
void attend_inputs(const Context<R>& c, int64_t l, int64_t b) {
  const Sizes& s = c.s;
  const LayerSpace& a = c.layout->layers[l];
  const R *gain = c.w(c.map->layers[l].ln1_w), *shift = c.w(c.map->layers[l].ln1_b);
  for (int64_t h = 0; h < s.H; ++h)
    for (int64_t t = 0; t < c.batch->length[b]; ++t) {
      if (l == s.L - 1 && !c.batch->supervised[b * s.T + t]) continue;
      R* to = c.at(a.attended) + ((b * s.H + h) * s.T + t) * s.D;
      const R* probs = c.at(a.probs) + ((b * s.H + h) * s.T + t) * s.T;
      for (int64_t i = 0; i < s.D; ++i) to[i] = 0;
      for (int64_t j = 0; j <= t; ++j) {
        const R* xhat = c.at(a.xhat1) + (b * s.T + j) * s.D;
        for (int64_t i = 0; i < s.D; ++i) to[i] += probs[j] * xhat[i];
      }
      // The probabilities add up to 1.
      for (int64_t i = 0; i < s.D; ++i) to[i] = to[i] * gain[i] + shift[i];
    }
}
