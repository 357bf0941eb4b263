// SIMD vectors of one width an instruction set. Each lane holds a value of another sequence, so
// that no lane's arithmetic depends on what the other lanes hold: a loss has the same bits
// whatever group its trial point is evaluated in.
//
// Included by the evaluator's files inside their own namespace, after PSFAST_BYTES is set.

template <class R>
struct Lanes {
  typedef R V __attribute__((vector_size(PSFAST_BYTES)));
  static constexpr int W = PSFAST_BYTES / sizeof(R);
};

template <class R>
PSFAST_INLINE typename Lanes<R>::V splat(R value) {
  typename Lanes<R>::V v;
  for (int i = 0; i < Lanes<R>::W; ++i) v[i] = value;
  return v;
}

// Keeps a NaN.
template <class V>
PSFAST_INLINE V relu(V a) {
  return a < V{} ? V{} : a;
}

#if defined(PSFAST_AVX512)
PSFAST_INLINE bool any_nonzero(Lanes<float>::V v) {
  return _mm512_cmp_ps_mask((__m512)v, _mm512_setzero_ps(), _CMP_NEQ_UQ) != 0;
}
PSFAST_INLINE bool any_nonzero(Lanes<double>::V v) {
  return _mm512_cmp_pd_mask((__m512d)v, _mm512_setzero_pd(), _CMP_NEQ_UQ) != 0;
}
PSFAST_INLINE Lanes<float>::V square_root(Lanes<float>::V v) {
  return (Lanes<float>::V)_mm512_sqrt_ps((__m512)v);
}
PSFAST_INLINE Lanes<double>::V square_root(Lanes<double>::V v) {
  return (Lanes<double>::V)_mm512_sqrt_pd((__m512d)v);
}
#elif defined(PSFAST_AVX2)
PSFAST_INLINE bool any_nonzero(Lanes<float>::V v) {
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_setzero_ps(), _CMP_NEQ_UQ)) != 0;
}
PSFAST_INLINE bool any_nonzero(Lanes<double>::V v) {
  return _mm256_movemask_pd(_mm256_cmp_pd((__m256d)v, _mm256_setzero_pd(), _CMP_NEQ_UQ)) != 0;
}
PSFAST_INLINE Lanes<float>::V square_root(Lanes<float>::V v) {
  return (Lanes<float>::V)_mm256_sqrt_ps((__m256)v);
}
PSFAST_INLINE Lanes<double>::V square_root(Lanes<double>::V v) {
  return (Lanes<double>::V)_mm256_sqrt_pd((__m256d)v);
}
#else
template <class V>
PSFAST_INLINE bool any_nonzero(V v) {
  bool any = false;
  for (unsigned i = 0; i < sizeof(v) / sizeof(v[0]); ++i) any |= v[i] != 0;
  return any;
}
template <class V>
PSFAST_INLINE V square_root(V v) {
  for (unsigned i = 0; i < sizeof(v) / sizeof(v[0]); ++i) v[i] = std::sqrt(v[i]);
  return v;
}
#endif

// to[i] = v[from[i]]
template <class R>
PSFAST_INLINE typename Lanes<R>::V permute(typename Lanes<R>::V v, const int32_t* from) {
#if defined(PSFAST_AVX512)
  if (sizeof(R) == 4)
    return (typename Lanes<R>::V)_mm512_permutexvar_ps(_mm512_loadu_si512(from), (__m512)v);
#endif
  typename Lanes<R>::V to;
  for (int i = 0; i < Lanes<R>::W; ++i) to[i] = v[from[i]];
  return to;
}

template <class R>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  typedef int32_t Int;
  static constexpr int mantissa = 23, degree = 7;
  static constexpr Int one = 0x3f800000;
  static constexpr float lowest = -87.0f, shift = 12582912.0f;  // 1.5 * 2^23
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
};
template <>
struct ExpConstants<double> {
  typedef int64_t Int;
  static constexpr int mantissa = 52, degree = 13;
  static constexpr Int one = 0x3ff0000000000000;
  static constexpr double lowest = -708.0, shift = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double ln2_high = 0.693145751953125, ln2_low = 1.42860682030941723212e-6;
};

// exp(x) for x <= 0, to about one unit in the last place; NaN stays NaN. Below `lowest` the
// result is exp(lowest), which no sum that holds exp(0) can tell from 0.
//
// x = n ln 2 + r with |r| <= ln(2) / 2; exp(r) by its Taylor series, 2^n by its exponent bits.
template <class R>
PSFAST_INLINE typename Lanes<R>::V exp_negative(typename Lanes<R>::V x) {
  using C = ExpConstants<R>;
  typedef typename C::Int Ints __attribute__((vector_size(PSFAST_BYTES)));
  typedef typename Lanes<R>::V V;
  x = x < splat<R>(C::lowest) ? splat<R>(C::lowest) : x;
  const V shifted = x * R(1.4426950408889634) + C::shift;
  const V n = shifted - C::shift;
  V r = x - n * C::ln2_high;
  r = r - n * C::ln2_low;
  constexpr R inverse_factorial[] = {
      R(1.0),           R(1.0),           R(1.0 / 2),        R(1.0 / 6),        R(1.0 / 24),
      R(1.0 / 120),     R(1.0 / 720),     R(1.0 / 5040),     R(1.0 / 40320),    R(1.0 / 362880),
      R(1.0 / 3628800), R(1.0 / 39916800), R(1.0 / 479001600), R(1.0 / 6227020800.0)};
  V p = splat<R>(inverse_factorial[C::degree]);
  for (int k = C::degree - 1; k >= 0; --k) p = p * r + inverse_factorial[k];
  const Ints scale = ((Ints)shifted << C::mantissa) + C::one;
  return p * (V)scale;
}
