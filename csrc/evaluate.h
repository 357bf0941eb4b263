// The evaluator of groups of trial points, compiled once an instruction set.
//
// A tile is M vectors of W lanes, each lane a sequence as one trial point sees it. An activation
// of width N at one position is a panel [N][M] of vectors. Products read a weight once for all
// lanes; LayerNorm, softmax and attention have no sums across lanes.
//
// Where there are few sequences, F lanes share one: panel p holds its positions F p to
// F p + F - 1 (its phases), and keys and values are spread to all lanes before attention.
//
// Included by the evaluator's files inside their own namespace.

template <class R, int M>
class Tile {
  typedef typename Lanes<R>::V V;
  static constexpr int W = Lanes<R>::W;
  static constexpr int S = M * W;

 public:
  Tile(const Context<R>& context, const Trial<R>* trials) : c(context), s(c.s), trials(trials) {
    static thread_local Arena arena;
    const int64_t widest = std::max(std::max(c.layout->layers[0].qkv.N, c.layout->head.N),
                                    c.layout->layers[0].ff1.N);
    const int64_t times = s.T + W;  // padded to whole panels
    const int64_t vectors = M * (3 * s.T * s.D + (s.T + 2 * times / 3 + 1) * 3 * s.dk_padded() +
                                 2 * widest + times + 2 * round_up(s.D) + 3 * s.T);
    arena.reserve(vectors * sizeof(V) + widest * 4 + s.T + 2 * S * s.T * 8 + 24 * 64);
    x = arena.template take<V>(M * s.T * s.D);
    centred = arena.template take<V>(M * s.T * s.D);
    mixed = arena.template take<V>(M * s.T * s.D);
    head_qkv = arena.template take<V>(M * s.T * 3 * s.dk_padded());
    wide = arena.template take<V>(M * widest);
    column = arena.template take<V>(M * widest);
    spread_kv = arena.template take<V>(M * times * 2 * s.dk_padded());
    weights_row = arena.template take<V>(M * times);
    row_change = arena.template take<double>(S * s.T);
    row_ratio = arena.template take<double>(S * s.T);
    stream_column = arena.template take<V>(M * round_up(s.D));
    narrow = arena.template take<V>(M * round_up(s.D));
    rstd = arena.template take<V>(M * s.T);
    g = arena.template take<V>(M * s.T);
    g_key = arena.template take<V>(M * s.T);
    list = arena.template take<int32_t>(widest);
    need = arena.template take<uint8_t>(s.T);
  }

  // Evaluates n <= S streams and writes each one's change of the summed loss to diff[0..n).
  void evaluate(const Group& group, const Stream* streams, int n, double* diff) {
    place(n, [&](int i) { return streams[i].b; });
    int t0 = static_cast<int>(s.T);
    for (int i = 0; i < n; ++i) t0 = std::min<int>(t0, streams[i].t0);
    first = t0 / F;
    start(group, streams);
    for (int i = 0; i < n; ++i) diff[i] = change_of(streams[i].b, i, first * F);
  }

  // Runs the weights as they are from layer `l`, from behind attention if `behind_attention`, for
  // the sequences [b0, b0 + n), and keeps their losses; the activations too if `keep_all`.
  void refresh(int64_t l, bool behind_attention, int64_t b0, int n, bool keep_all) {
    place(n, [&](int i) { return b0 + i; });
    first = 0;
    absolute = true;
    store = keep_all;
    for (int p = 0; p < P; ++p) {
      if (l == 0 && !behind_attention) embed(p);
      else load(x_at(p), c.at(input_of(l)), s.D, p, s.D);
    }
    for (; l < s.L; ++l) {
      if (!behind_attention) attention_layer(l, Plain{});
      for (int p = 0; p < P; ++p) {
        if (!needed(l, p)) continue;
        if (behind_attention) load(x_at(p), c.at(layer(l).y), s.D, p, s.D);
        else if (store) keep(x_at(p), c.at(layer(l).y), s.D, p, s.D);
        hidden(l, p);
        second(l, p);
      }
      behind_attention = false;
    }
    for (int p = 0; p < P; ++p)
      if (need[p]) finish(p, Plain{});
  }

 private:
  struct Plain {};    // activations come through the products
  struct Rank1 {};    // activations come from the cache and one column
  struct Given {};    // the same for q, k and v themselves, LayerNorm untouched

  const Context<R>& c;
  const Sizes& s;
  const Trial<R>* trials;
  V *x, *centred, *mixed, *head_qkv, *spread_kv, *wide, *column, *weights_row, *stream_column;
  V *narrow, *rstd, *g, *g_key;
  double *row_change, *row_ratio;  // [S][T]
  int32_t* list;
  uint8_t* need;
  int64_t b[S];
  int stream[S], phase[S];  // of each lane
  int32_t spread[W];        // where each lane finds phase 0 of its sequence (M = 1)
  bool uniform = true, store = false, absolute = false;
  int P = 0, first = 0, lanes = 0, F = 1;  // panels, the first to compute, lanes in use
  int64_t live = 0;

  const LayerSpace& layer(int64_t l) const { return c.layout->layers[l]; }
  const LayerWeights& weights(int64_t l) const { return c.map->layers[l]; }
  size_t input_of(int64_t l) const { return l < s.L ? layer(l).x : c.layout->x; }
  V* x_at(int p) const { return x + p * s.D * M; }
  V* centred_at(int p) const { return centred + p * s.D * M; }
  V* mixed_at(int p) const { return mixed + p * s.D * M; }
  bool needed(int64_t l, int p) const { return l < s.L - 1 || need[p]; }
  int time(int lane, int p) const { return p * F + phase[lane]; }
  bool counts(int lane, int p) const { return time(lane, p) < c.batch->length[b[lane]]; }
  // Lanes past the end of their sequence repeat its last position; nothing reads them.
  int64_t row(int lane, int p) const {
    return b[lane] * s.T + std::min<int64_t>(time(lane, p), s.T - 1);
  }
  const Trial<R>& trial_of(int lane, const Stream* streams) const {
    return trials[streams[stream[lane]].trial];
  }

  template <class Sequence>
  void place(int n, Sequence sequence) {
    F = 1;
    while (M == 1 && 2 * F * n <= W) F *= 2;
    lanes = n * F;
    uniform = F == 1;
    int longest = 0;
    for (int i = 0; i < S; ++i) {
      stream[i] = i < lanes ? i / F : 0;
      phase[i] = i % F;
      b[i] = sequence(stream[i]);
      uniform = uniform && b[i] == b[0];
      longest = std::max<int>(longest, c.batch->length[b[i]]);
      if (M == 1) spread[i] = i - phase[i];
    }
    P = (longest + F - 1) / F;
    for (int p = 0; p < P; ++p) {
      need[p] = 0;
      for (int i = 0; i < S; ++i) need[p] |= counts(i, p) && c.batch->supervised[row(i, p)];
    }
  }

  // The change of the summed loss of stream i, its rows from t0 on added in their order.
  double change_of(int64_t sequence, int i, int t0) const {
    const uint8_t* supervised = c.batch->supervised.data() + sequence * s.T;
    double change = 0, ratio = 1;
    for (int t = t0; t < c.batch->length[sequence]; ++t) {
      if (!supervised[t]) continue;
      change += row_change[i * s.T + t];
      ratio *= row_ratio[i * s.T + t];
      if (t % 8 != 7) continue;
      change += std::log(ratio);  // before the product can leave the range of a double
      ratio = 1;
    }
    return change + std::log(ratio);
  }

  // panel [N] <- rows of a cached array of width ld.
  void load(V* panel, const R* base, int64_t ld, int p, int64_t N) const {
    if (uniform) {
      const R* from = base + row(0, p) * ld;
      for (int64_t n = 0; n < N; ++n)
        for (int m = 0; m < M; ++m) panel[n * M + m] = splat<R>(from[n]);
      return;
    }
    for (int i = 0; i < S; ++i) {
      const R* from = base + row(i, p) * ld;
      R* to = reinterpret_cast<R*>(panel) + i;
      for (int64_t n = 0; n < N; ++n) to[n * S] = from[n];
    }
  }

  // The same at one position for all lanes, whatever their phases.
  void load_time(V* panel, const R* base, int64_t ld, int t, int64_t N) const {
    if (uniform) return load(panel, base, ld, t, N);
    for (int i = 0; i < S; ++i) {
      const R* from = base + (b[i] * s.T + t) * ld;
      R* to = reinterpret_cast<R*>(panel) + i;
      for (int64_t n = 0; n < N; ++n) to[n * S] = from[n];
    }
  }

  // The reverse, for the incumbent.
  void keep(const V* panel, R* base, int64_t ld, int p, int64_t N) const {
    for (int i = 0; i < lanes; ++i) {
      if (time(i, p) >= s.T) continue;
      R* to = base + row(i, p) * ld;
      const R* from = reinterpret_cast<const R*>(panel) + i;
      for (int64_t n = 0; n < N; ++n) to[n] = from[n * S];
    }
  }

  // panel [N] <- for each lane the N numbers that `at(trial, n)` names.
  template <class At>
  void gather(V* panel, const Stream* streams, int64_t N, At at) const {
    for (int i = 0; i < S; ++i) {
      const Trial<R>& trial = trial_of(i, streams);
      R* to = reinterpret_cast<R*>(panel) + i;
      for (int64_t n = 0; n < N; ++n) to[n * S] = at(trial, n);
    }
  }

  // The same where the numbers come in runs of kBlock, `stride` apart: column k of a pack, or a
  // row of `centred` or `product`. N is whole blocks.
  struct Runs {
    const R* from;
    int64_t stride;
  };
  template <class Of>
  void gather_runs(V* panel, const Stream* streams, int64_t N, Of of) const {
    for (int i = 0; i < S; ++i) {
      const Runs runs = of(trial_of(i, streams));
      R* to = reinterpret_cast<R*>(panel) + i;
      for (int64_t block = 0; block < N / kBlock; ++block)
        for (int k = 0; k < kBlock; ++k)
          to[(block * kBlock + k) * S] = runs.from[block * runs.stride + k];
    }
  }
  Runs pack_column(size_t pack, int64_t k, int64_t K) const {
    return {c.at(pack) + k * kBlock, K * kBlock};
  }
  Runs row_of(size_t rows, int64_t row, int64_t N) const {
    return {c.at(rows) + row * N, kBlock};
  }
  // stream_column, zeros so far: 1 at the element that each lane's trial point changes, if one.
  template <class Element>
  void set_ones(const Stream* streams, Element element) {
    for (int i = 0; i < S; ++i) {
      const int64_t n = element(trial_of(i, streams));
      if (n >= 0) reinterpret_cast<R*>(stream_column)[n * S + i] = R(1);
    }
  }
  static const R* zeros() {
    static const R values[kBlock] = {};
    return values;
  }

  void embed(int p) {
    for (int i = 0; i < S; ++i) {
      const R* token = c.w(c.map->tokens) + c.tokens[row(i, p)] * s.D;
      const R* position = c.w(c.map->positions) + row(i, p) % s.T * s.D;
      R* to = reinterpret_cast<R*>(x_at(p)) + i;
      for (int64_t n = 0; n < s.D; ++n) to[n * S] = token[n] + position[n];
    }
    if (store) keep(x_at(p), c.at(layer(0).x), s.D, p, s.D);
  }

  // to = from - mean; scale = 1 / sqrt(variance + eps).
  void center(const V* from, V* to, V* scale) const {
    const int64_t D = s.D;
    const R inverse = R(1) / static_cast<R>(D);
    for (int m = 0; m < M; ++m) {
      V sum[4] = {};
      for (int64_t n = 0; n < D; ++n) sum[n & 3] += from[n * M + m];
      const V mean = ((sum[0] + sum[1]) + (sum[2] + sum[3])) * inverse;
      V square[4] = {};
      for (int64_t n = 0; n < D; ++n) {
        const V d = from[n * M + m] - mean;
        to[n * M + m] = d;
        square[n & 3] += d * d;
      }
      const V variance = ((square[0] + square[1]) + (square[2] + square[3])) * inverse;
      scale[m] = splat<R>(1) / square_root(variance + static_cast<R>(s.eps));
    }
  }

  void keep_normalised(const V* from, const V* scale, size_t offset, int p) {
    for (int64_t n = 0; n < s.D; ++n)
      for (int m = 0; m < M; ++m) narrow[n * M + m] = from[n * M + m] * scale[m];
    keep(narrow, c.at(offset), s.D, p, s.D);
  }

  // One head's q, k and v at position p, panel [3 dk_padded].
  void head_projection(int64_t l, int64_t h, int p, Plain) {
    const Fold& f = layer(l).qkv;
    const int64_t width = s.dk_padded(), n0 = h * 3 * width;
    const int64_t skip = needed(l, p) ? 0 : width;  // the query, where none is asked
    V* to = head_qkv + p * 3 * width * M;
    const V* scale = rstd + p * M;
    const R* bias = c.at(f.bias) + n0;
    multiply<R, M>(centred_at(p), s.D, c.at(f.pack) + (n0 + skip) * s.D, s.D * kBlock,
                   (3 * width - skip) / kBlock, nullptr, [&](int64_t n, const V* acc) {
                     n += skip;
                     for (int m = 0; m < M; ++m) {
                       if (store) wide[n * M + m] = acc[m];
                       to[n * M + m] = scale[m] * acc[m] + bias[n];
                     }
                   });
    if (store) {
      keep(wide + skip * M, c.at(f_raw(l)) + n0 + skip, f.N, p, 3 * width - skip);
      keep(to + skip * M, c.at(layer(l).qkv_out) + n0 + skip, f.N, p, 3 * width - skip);
    }
  }

  size_t f_raw(int64_t l) const { return layer(l).qkv_raw; }

  void head_projection(int64_t l, int64_t h, int p, Rank1) {
    const Fold& f = layer(l).qkv;
    const int64_t width = 3 * s.dk_padded(), n0 = h * width;
    V* to = head_qkv + p * width * M;
    load(to, c.at(f_raw(l)) + n0, f.N, p, width);
    const R* bias = c.at(f.bias) + n0;
    for (int64_t n = 0; n < width; ++n)
      for (int m = 0; m < M; ++m) {
        const V raw = to[n * M + m] + g[p * M + m] * column[(n0 + n) * M + m];
        to[n * M + m] = rstd[p * M + m] * raw + bias[n];
      }
  }

  void head_projection(int64_t l, int64_t h, int p, Given) {
    const Fold& f = layer(l).qkv;
    const int64_t width = 3 * s.dk_padded(), n0 = h * width;
    V* to = head_qkv + p * width * M;
    load(to, c.at(layer(l).qkv_out) + n0, f.N, p, width);
    for (int64_t n = 0; n < width; ++n)
      for (int m = 0; m < M; ++m) to[n * M + m] += g[p * M + m] * column[(n0 + n) * M + m];
  }

  // How many keys the last phase of panel p sees.
  int keys(int p) const { return std::min<int>(p * F + F, static_cast<int>(s.T)); }

  // Which lanes of panel p do not see key j.
  template <class Value>
  void hide(int p, int j, V* v, Value value) const {
    if (F == 1 || j <= p * F) return;
    for (int i = 0; i < S; ++i)
      if (time(i, p) < j) reinterpret_cast<R*>(v)[i] = value;
  }

  // weights_row[0..keys) <- softmax of the scores there.
  void softmax(int p) {
    const int n = keys(p);
    for (int j = p * F + 1; j < n; ++j)
      hide(p, j, weights_row + j * M, -std::numeric_limits<R>::infinity());
    V top[M];
    for (int m = 0; m < M; ++m) top[m] = weights_row[m];
    for (int j = 1; j < n; ++j)
      for (int m = 0; m < M; ++m) {
        const V v = weights_row[j * M + m];
        top[m] = v > top[m] ? v : top[m];
      }
    V sum[M] = {};
    for (int j = 0; j < n; ++j) {
      V* e = weights_row + j * M;
      for (int m = 0; m < M; ++m) e[m] = exp_negative<R>(e[m] - top[m]);
      hide(p, j, e, R(0));
      for (int m = 0; m < M; ++m) sum[m] += e[m];
    }
    for (int m = 0; m < M; ++m) sum[m] = splat<R>(1) / sum[m];
    for (int j = 0; j < n; ++j)
      for (int m = 0; m < M; ++m) weights_row[j * M + m] *= sum[m];
  }

  // out[0..dk) = the weighted mean of the values, `stride` vectors a position.
  void mix(int p, const V* values, int64_t stride, V* out) const {
    const int n = keys(p);
    for (int64_t f = 0; f < s.dk(); f += 4) {
      const int64_t some = std::min<int64_t>(4, s.dk() - f);
      V acc[4][M] = {};
      for (int j = 0; j < n; ++j) {
        const V* v = values + j * stride + f * M;
        for (int i = 0; i < 4; ++i)
          for (int m = 0; m < M; ++m) acc[i][m] += weights_row[j * M + m] * v[i * M + m];
      }
      for (int i = 0; i < some; ++i)
        for (int m = 0; m < M; ++m) out[(f + i) * M + m] = acc[i][m];
    }
  }

  // Keys, then values, by position: those of this tile, before `first` the incumbent's.
  const V* head_keys(int64_t l, int64_t h, int64_t* stride) {
    const int64_t width = s.dk_padded();
    const bool direct = F == 1;
    V* to = direct ? head_qkv + width * M : spread_kv;
    *stride = (direct ? 3 : 2) * width * M;
    for (int t = 0; t < first * F; ++t)
      load_time(to + t * *stride, c.at(layer(l).qkv_out) + (3 * h + 1) * width, layer(l).qkv.N, t,
                2 * width);
    if (direct) return to;
    for (int t = first * F; t < keys(P - 1); ++t) {
      const V* from = head_qkv + (t / F * 3 + 1) * width * M;
      int32_t at[W];
      for (int i = 0; i < W; ++i) at[i] = spread[i] + t % F;
      for (int64_t n = 0; n < 2 * width; ++n) to[t * *stride + n] = permute<R>(from[n], at);
    }
    return to;
  }

  void attend(int64_t l, int64_t h, int p, const V* kv, int64_t stride) {
    const int64_t dk = s.dk(), width = s.dk_padded();
    const V* q = head_qkv + p * 3 * width * M;
    const R scale = R(1) / std::sqrt(static_cast<R>(dk));
    for (int j = 0; j < keys(p); ++j) {
      const V* k = kv + j * stride;
      V acc[M] = {};
      for (int64_t f = 0; f < dk; ++f)
        for (int m = 0; m < M; ++m) acc[m] += q[f * M + m] * k[f * M + m];
      for (int m = 0; m < M; ++m) weights_row[j * M + m] = acc[m] * scale;
    }
    if (store) keep_row(layer(l).scores, h, p);
    softmax(p);
    if (store) keep_row(layer(l).probs, h, p);
    mix(p, kv + width * M, stride, mixed_at(p) + h * dk * M);
  }

  void keep_row(size_t offset, int64_t h, int p) {
    for (int i = 0; i < lanes; ++i) {
      const int t = time(i, p);
      if (t >= s.T) continue;
      R* to = c.at(offset) + ((b[i] * s.H + h) * s.T + t) * s.T;
      for (int j = 0; j <= t; ++j) to[j] = reinterpret_cast<R*>(weights_row)[j * S + i];
    }
  }

  // x <- x + attention(ln1(x)) at the positions needed from here on.
  template <class Way>
  void attention_layer(int64_t l, Way way) {
    if (!std::is_same<Way, Given>::value)
      for (int p = first; p < P; ++p) {
        center(x_at(p), centred_at(p), rstd + p * M);
        if (store) keep_normalised(centred_at(p), rstd + p * M, layer(l).xhat1, p);
      }
    for (int64_t h = 0; h < s.H; ++h) {
      for (int p = first; p < P; ++p) head_projection(l, h, p, way);
      int64_t stride;
      const V* kv = head_keys(l, h, &stride);
      for (int p = first; p < P; ++p)
        if (needed(l, p)) attend(l, h, p, kv, stride);
    }
    const R* bias = c.w(weights(l).out_b);
    for (int p = first; p < P; ++p) {
      if (!needed(l, p)) continue;
      if (store) keep(mixed_at(p), c.at(layer(l).mixed), s.D, p, s.D);
      V* y = x_at(p);
      multiply<R, M>(mixed_at(p), s.D, c.at(layer(l).out_pack), s.D * kBlock,
                     round_up(s.D) / kBlock, nullptr, [&](int64_t n, const V* acc) {
                       if (n >= s.D) return;
                       for (int m = 0; m < M; ++m) y[n * M + m] += acc[m] + bias[n];
                     });
    }
  }

  // wide <- relu(ff1(ln2(y))), list <- its nonzero units.
  void hidden(int64_t l, int p) {
    const Fold& f = layer(l).ff1;
    V scale[M];
    center(x_at(p), centred_at(p), scale);
    if (store) keep_normalised(centred_at(p), scale, layer(l).xhat2, p);
    multiply<R, M>(centred_at(p), s.D, c.at(f.pack), s.D * kBlock, f.N / kBlock, nullptr,
                   [&](int64_t n, const V* acc) {
                     for (int m = 0; m < M; ++m) wide[n * M + m] = acc[m];
                   });
    if (store) keep(wide, c.at(layer(l).ff_raw), f.N, p, f.N);
    scale_and_shift(c.at(f.bias), scale, f.N);
    if (store) keep(wide, c.at(layer(l).ff_pre), f.N, p, f.N);
    rectify();
  }

  void scale_and_shift(const R* bias, const V* scale, int64_t N) {
    for (int64_t n = 0; n < N; ++n)
      for (int m = 0; m < M; ++m) wide[n * M + m] = scale[m] * wide[n * M + m] + bias[n];
  }

  void rectify() {
    live = 0;
    for (int64_t n = 0; n < s.F; ++n) {
      bool any = false;
      for (int m = 0; m < M; ++m) {
        const V v = relu(wide[n * M + m]);
        wide[n * M + m] = v;
        any |= any_nonzero(v);
      }
      list[live] = static_cast<int32_t>(n);
      live += any;
    }
  }

  // x <- y + dropout(ff2(wide)); x holds y.
  void second(int64_t l, int p) {
    const R* bias = c.w(weights(l).ff2_b);
    const R* pack = c.at(layer(l).ff2_pack);
    const int64_t blocks = round_up(s.D) / kBlock;
    V* to = x_at(p);
    // Two loops: a branch inside would leave it to the compiler whether `to += v * mask` rounds
    // once or twice, and not alike in tiles of every M.
    if (c.mask) {
      load(narrow, c.mask + l * s.rows() * s.D, s.D, p, s.D);
      multiply<R, M>(wide, live, pack, s.F * kBlock, blocks, list, [&](int64_t n, const V* acc) {
        if (n >= s.D) return;
        for (int m = 0; m < M; ++m) to[n * M + m] += (acc[m] + bias[n]) * narrow[n * M + m];
      });
    } else {
      multiply<R, M>(wide, live, pack, s.F * kBlock, blocks, list, [&](int64_t n, const V* acc) {
        if (n >= s.D) return;
        for (int m = 0; m < M; ++m) to[n * M + m] += acc[m] + bias[n];
      });
    }
    if (store) keep(to, c.at(input_of(l + 1)), s.D, p, s.D);
  }

  // The logits at position p, then their loss.
  void finish(int p, Plain) {
    const Fold& f = c.layout->head;
    V scale[M];
    center(x_at(p), centred_at(p), scale);
    if (store) keep_normalised(centred_at(p), scale, c.layout->xhat, p);
    multiply<R, M>(centred_at(p), s.D, c.at(f.pack), s.D * kBlock, f.N / kBlock, nullptr,
                   [&](int64_t n, const V* acc) {
                     for (int m = 0; m < M; ++m) wide[n * M + m] = acc[m];
                   });
    if (store) keep(wide, c.at(c.layout->logits_raw), f.N, p, f.N);
    scale_and_shift(c.at(f.bias), scale, f.N);
    if (store) keep(wide, c.at(c.layout->logits), f.N, p, f.N);
    cross_entropy(p);
  }

  void finish(int p, Rank1) {
    const Fold& f = c.layout->head;
    V scale[M];
    center(x_at(p), centred_at(p), scale);
    load(wide, c.at(c.layout->logits_raw), f.N, p, f.N);
    add_column(p, f.N);
    scale_and_shift(c.at(f.bias), scale, f.N);
    cross_entropy(p);
  }

  void finish(int p, Given) {
    const Fold& f = c.layout->head;
    load(wide, c.at(c.layout->logits), f.N, p, f.N);
    add_column(p, f.N);
    cross_entropy(p);
  }

  void add_column(int p, int64_t N) {
    for (int64_t n = 0; n < N; ++n)
      for (int m = 0; m < M; ++m) wide[n * M + m] += g[p * M + m] * column[n * M + m];
  }

  // Each row's loss, or its loss minus the incumbent's, as a difference and a ratio whose logarithm
  // is taken once a sequence: log(sum / sum0) over the rows is the logarithm of the product.
  // What is not on top is added by itself: 1 + sum would round the small loss of a good model.
  void cross_entropy(int p) {
    V top[M], sum[M] = {}, on_top[M] = {};
    for (int m = 0; m < M; ++m) top[m] = wide[m];
    for (int64_t n = 1; n < s.V; ++n)
      for (int m = 0; m < M; ++m) {
        const V v = wide[n * M + m];
        top[m] = v > top[m] ? v : top[m];
      }
    for (int64_t n = 0; n < s.V; ++n)
      for (int m = 0; m < M; ++m) {
        const V below = wide[n * M + m] - top[m];  // NaN, where a logit is not finite
        const V e = exp_negative<R>(below);
        sum[m] += below >= V{} ? V{} : e;
        on_top[m] += below >= V{} ? splat<R>(1) : V{};
      }
    const R* tops = reinterpret_cast<const R*>(top);
    const R* sums = reinterpret_cast<const R*>(sum);
    const R* ones = reinterpret_cast<const R*>(on_top);
    const R* logits = reinterpret_cast<const R*>(wide);
    for (int i = 0; i < lanes; ++i) {
      const int64_t at = row(i, p);
      if (!counts(i, p) || !c.batch->supervised[at]) continue;
      const double shift = double(tops[i]) - double(logits[c.targets[at] * S + i]);
      const double total = double(ones[i]) + double(sums[i]);
      if (absolute) {
        c.row_shift()[at] = shift;
        c.row_sum()[at] = total;
      } else {
        row_change[stream[i] * s.T + time(i, p)] = shift - c.row_shift()[at];
        row_ratio[stream[i] * s.T + time(i, p)] = total / c.row_sum()[at];
      }
    }
  }

  void feed_forward(int64_t l) {
    for (int p = first; p < P; ++p) {
      if (!needed(l, p)) continue;
      hidden(l, p);
      second(l, p);
    }
  }

  // The layers from l on, x at their input.
  void remaining(int64_t l) {
    for (; l < s.L; ++l) {
      attention_layer(l, Plain{});
      feed_forward(l);
    }
    for (int p = first; p < P; ++p)
      if (need[p]) finish(p, Plain{});
  }

  // starts.h
  void start(const Group& group, const Stream* streams);
  void coefficients(const Stream* streams);
  void start_stream(int64_t l, const Stream* streams, bool prepared);
  void start_qkv(int64_t l, const Stream* streams);
  void score_factors(int64_t l, int64_t h, const Stream* streams);
  void load_row(V* to, size_t offset, int64_t h, int p) const;
  void start_scores(int64_t l, int64_t h, const Stream* streams);
  void start_attention(int64_t l, const Stream* streams);
  void start_hidden(int64_t l, const Stream* streams);
  void start_logits(const Stream* streams);
};
