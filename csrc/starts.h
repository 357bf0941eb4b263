// How a tile starts: at the changed tensor, from the incumbent's activations plus a rank-1 term.
//
// Included by the evaluator's files inside their own namespace.

template <class R, int M>
void Tile<R, M>::start(const Group& group, const Stream* streams) {
  const int64_t l = group.layer;
  if (group.entry != Entry::scores) coefficients(streams);
  switch (group.entry) {
    case Entry::stream: return start_stream(l, streams, true);
    case Entry::stream_plain: return start_stream(l, streams, false);
    case Entry::qkv: return start_qkv(l, streams);
    case Entry::scores: return start_scores(l, group.head, streams);
    case Entry::attention: return start_attention(l, streams);
    case Entry::hidden: return start_hidden(l, streams);
    case Entry::logits: return start_logits(streams);
    default: return;
  }
}

template <class R, int M>
void Tile<R, M>::coefficients(const Stream* streams) {
  R* to = reinterpret_cast<R*>(g);
  for (int i = 0; i < S; ++i) {
    const Trial<R>& trial = trial_of(i, streams);
    for (int p = first; p < P; ++p)
      to[p * S + i] = counts(i, p) ? coefficient(c, trial, b[i], time(i, p)) : R(0);
  }
}

// Where the residual stream itself changes: before layer l, or before final_norm for l = L.
template <class R, int M>
void Tile<R, M>::start_stream(int64_t l, const Stream* streams, bool prepared) {
  auto element = [](const Trial<R>& t) {  // the one that changes; -1 for a whole column of ff2
    const bool ff2 = t.at.kind == Kind::ff2_w || t.at.kind == Kind::ff2_b;
    const bool ff1 = t.at.kind == Kind::ff1_w || t.at.kind == Kind::ff1_b;
    return ff1 ? -1 : ff2 ? t.at.row : t.at.col;
  };
  gather_runs(stream_column, streams, round_up(s.D), [&](const Trial<R>& t) {
    const bool whole = element(t) < 0;
    return whole ? pack_column(layer(t.at.layer).ff2_pack, t.at.row, s.F) : Runs{zeros(), 0};
  });
  set_ones(streams, element);
  const Fold& f = l < s.L ? layer(l).qkv : c.layout->head;
  if (prepared)
    gather_runs(column, streams, f.N, [&](const Trial<R>& t) {
      const bool whole = element(t) < 0;
      return whole ? row_of(f.product, t.at.row, f.N) : row_of(f.centred, element(t), f.N);
    });
  for (int p = first; p < P; ++p) {
    if (l == s.L && !need[p]) continue;
    V* to = x_at(p);
    load(to, c.at(input_of(l)), s.D, p, s.D);
    if (prepared) {
      for (int64_t i = 0; i < s.D; ++i)
        for (int m = 0; m < M; ++m) to[i * M + m] += g[p * M + m] * stream_column[i * M + m];
      continue;
    }
    load(narrow, c.mask + (l - 1) * s.rows() * s.D, s.D, p, s.D);
    for (int64_t i = 0; i < s.D * M; ++i) narrow[i] *= stream_column[i];
    for (int64_t i = 0; i < s.D; ++i)
      for (int m = 0; m < M; ++m) to[i * M + m] += g[p * M + m] * narrow[i * M + m];
  }
  if (l == s.L) {
    for (int p = first; p < P; ++p) {
      if (!need[p]) continue;
      if (prepared) finish(p, Rank1{});
      else finish(p, Plain{});
    }
    return;
  }
  if (prepared) attention_layer(l, Rank1{});
  else attention_layer(l, Plain{});
  feed_forward(l);
  remaining(l + 1);
}

template <class R, int M>
void Tile<R, M>::start_qkv(int64_t l, const Stream* streams) {
  const R* weight = c.w(weights(l).qkv_w);
  const int64_t width = s.dk_padded();
  gather(column, streams, layer(l).qkv.N, [&](const Trial<R>& t, int64_t i) {
    const int64_t part = i / width, k = i % width;
    return k < s.dk() ? weight[(part * s.dk() + k) * s.D + t.at.row] : R(0);
  });
  for (int p = first; p < P; ++p)
    if (needed(l, p)) load(x_at(p), c.at(layer(l).x), s.D, p, s.D);
  attention_layer(l, Given{});
  feed_forward(l);
  remaining(l + 1);
}

// A row of q or k of head h: score[t][j] changes by query[t] * key[j].
template <class R, int M>
void Tile<R, M>::score_factors(int64_t l, int64_t h, const Stream* streams) {
  const LayerSpace& a = layer(l);
  const R scale = R(1) / std::sqrt(static_cast<R>(s.dk()));
  const R *gain = c.w(weights(l).ln1_w), *shift = c.w(weights(l).ln1_b);
  R *query = reinterpret_cast<R*>(g), *key = reinterpret_cast<R*>(g_key);
  for (int i = 0; i < S; ++i) {
    const Trial<R>& t = trial_of(i, streams);
    const bool is_query = t.at.row / s.dk() % 3 == 0, is_bias = t.at.kind == Kind::qkv_b;
    // A query's change meets the keys, a key's change the queries.
    const int64_t partner = (3 * h + (is_query ? 1 : 0)) * s.dk_padded() + t.at.row % s.dk();
    auto input = [&](int64_t at) {
      if (is_bias) return R(1);
      return c.at(a.xhat1)[at * s.D + t.at.col] * gain[t.at.col] + shift[t.at.col];
    };
    auto other = [&](int64_t at) { return c.at(a.qkv_out)[at * a.qkv.N + partner]; };
    for (int p = first; p < P; ++p) {
      R factor = R(0);
      if (counts(i, p)) factor = is_query ? input(row(i, p)) : other(row(i, p));
      query[p * S + i] = t.delta * scale * factor;
    }
    for (int j = 0; j < keys(P - 1); ++j) {
      const int64_t at = b[i] * s.T + j;
      key[j * S + i] = R(0);
      if (j < c.batch->length[b[i]]) key[j * S + i] = is_query ? other(at) : input(at);
    }
  }
}

template <class R, int M>
void Tile<R, M>::load_row(V* to, size_t offset, int64_t h, int p) const {
  for (int i = 0; i < S; ++i) {
    const int64_t t = std::min<int64_t>(time(i, p), s.T - 1);
    const R* from = c.at(offset) + ((b[i] * s.H + h) * s.T + t) * s.T;
    R* at = reinterpret_cast<R*>(to) + i;
    for (int j = 0; j < keys(p); ++j) at[j * S] = j <= t ? from[j] : R(0);
  }
}

template <class R, int M>
void Tile<R, M>::start_scores(int64_t l, int64_t h, const Stream* streams) {
  const LayerSpace& a = layer(l);
  const int64_t dk = s.dk(), width = s.dk_padded();
  score_factors(l, h, streams);
  for (int j = 0; j < keys(P - 1); ++j)
    load_time(head_qkv + j * width * M, c.at(a.qkv_out) + (3 * h + 2) * width, a.qkv.N, j, width);
  for (int p = first; p < P; ++p) {
    if (!needed(l, p)) continue;
    load_row(weights_row, a.scores, h, p);
    for (int j = 0; j < keys(p); ++j)
      for (int m = 0; m < M; ++m) weights_row[j * M + m] += g[p * M + m] * g_key[j * M + m];
    softmax(p);
    V* change = mixed_at(p);
    mix(p, head_qkv, width * M, change);
    load(narrow, c.at(a.mixed) + h * dk, s.D, p, dk);
    for (int64_t f = 0; f < dk * M; ++f) change[f] -= narrow[f];
    V* y = x_at(p);
    load(y, c.at(a.y), s.D, p, s.D);
    multiply<R, M>(change, dk, c.at(a.out_pack) + h * dk * kBlock, s.D * kBlock,
                   round_up(s.D) / kBlock, nullptr, [&](int64_t i, const V* acc) {
                     if (i >= s.D) return;
                     for (int m = 0; m < M; ++m) y[i * M + m] += acc[m];
                   });
    V scale[M];
    center(y, centred_at(p), scale);
    load(wide, c.at(a.ff_raw), a.ff1.N, p, a.ff1.N);
    const R* bias = c.at(a.ff1.bias);
    multiply<R, M>(change, dk, c.at(a.ff1.product) + h * dk * kBlock, s.D * kBlock,
                   a.ff1.N / kBlock, nullptr, [&](int64_t i, const V* acc) {
                     for (int m = 0; m < M; ++m) wide[i * M + m] += acc[m];
                   });
    scale_and_shift(bias, scale, a.ff1.N);
    rectify();
    second(l, p);
  }
  remaining(l + 1);
}

// A value row or `out`: y changes by g[t] times one column.
template <class R, int M>
void Tile<R, M>::start_attention(int64_t l, const Stream* streams) {
  const LayerSpace& a = layer(l);
  auto source = [&](const Trial<R>& t) {  // which input of `out` the changed value row feeds
    return t.at.row / (3 * s.dk()) * s.dk() + t.at.row % s.dk();
  };
  auto is_out = [](const Trial<R>& t) {
    return t.at.kind == Kind::out_w || t.at.kind == Kind::out_b;
  };
  gather_runs(stream_column, streams, round_up(s.D), [&](const Trial<R>& t) {
    return is_out(t) ? Runs{zeros(), 0} : pack_column(a.out_pack, source(t), s.D);
  });
  set_ones(streams, [&](const Trial<R>& t) { return is_out(t) ? t.at.row : -1; });
  gather_runs(column, streams, a.ff1.N, [&](const Trial<R>& t) {
    return is_out(t) ? row_of(a.ff1.centred, t.at.row, a.ff1.N)
                     : pack_column(a.ff1.product, source(t), s.D);
  });
  for (int p = first; p < P; ++p) {
    if (!needed(l, p)) continue;
    V* y = x_at(p);
    load(y, c.at(a.y), s.D, p, s.D);
    for (int64_t i = 0; i < s.D; ++i)
      for (int m = 0; m < M; ++m) y[i * M + m] += g[p * M + m] * stream_column[i * M + m];
    V scale[M];
    center(y, centred_at(p), scale);
    load(wide, c.at(a.ff_raw), a.ff1.N, p, a.ff1.N);
    add_column(p, a.ff1.N);
    scale_and_shift(c.at(a.ff1.bias), scale, a.ff1.N);
    rectify();
    second(l, p);
  }
  remaining(l + 1);
}

template <class R, int M>
void Tile<R, M>::start_hidden(int64_t l, const Stream* streams) {
  const LayerSpace& a = layer(l);
  const R* weight = c.w(weights(l).ff1_w);
  gather(column, streams, a.ff1.N, [&](const Trial<R>& t, int64_t i) {
    return i < s.F ? weight[i * s.D + t.at.row] : R(0);
  });
  for (int p = first; p < P; ++p) {
    if (!needed(l, p)) continue;
    load(x_at(p), c.at(a.y), s.D, p, s.D);
    load(wide, c.at(a.ff_pre), a.ff1.N, p, a.ff1.N);
    add_column(p, a.ff1.N);
    rectify();
    second(l, p);
  }
  remaining(l + 1);
}

template <class R, int M>
void Tile<R, M>::start_logits(const Stream* streams) {
  const R* weight = c.w(c.map->head_w);
  gather(column, streams, c.layout->head.N, [&](const Trial<R>& t, int64_t i) {
    return i < s.V ? weight[i * s.D + t.at.row] : R(0);
  });
  for (int p = first; p < P; ++p)
    if (need[p]) finish(p, Given{});
}
