// The micro-kernel, and the work space of a thread.
//
// Included by the evaluator's files inside their own namespace.

// out(n, acc[M]) for n in [0, blocks * kBlock): acc = sum over k of weight[n][k] * x[k], in the
// order of k. x: panel [K][M]; weight: [blocks][K][kBlock], `stride` elements a block.
// With `list`, only the k in it are read: the others hold zeros, which would change no bit.
template <class R, int M, class Out>
PSFAST_INLINE void multiply(const typename Lanes<R>::V* x, int64_t K, const R* weight,
                            int64_t stride, int64_t blocks, const int32_t* list, Out out) {
  typedef typename Lanes<R>::V V;
  constexpr int N = PSFAST_OUTPUTS;
  for (int64_t block = 0; block < blocks; ++block) {
    for (int half = 0; half < kBlock; half += N) {
      const R* w = weight + block * stride + half;
      V acc[N][M];
      for (int i = 0; i < N; ++i)
        for (int m = 0; m < M; ++m) acc[i][m] = V{};
      for (int64_t j = 0; j < K; ++j) {
        const int64_t k = list ? list[j] : j;
        V xk[M];
        for (int m = 0; m < M; ++m) xk[m] = x[k * M + m];
        for (int i = 0; i < N; ++i) {
          const R wk = w[k * kBlock + i];
          for (int m = 0; m < M; ++m) acc[i][m] += xk[m] * wk;
        }
      }
      for (int i = 0; i < N; ++i) out(block * kBlock + half + i, acc[i]);
    }
  }
}

// Work space of one thread, cut from one allocation.
class Arena {
 public:
  void reserve(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      bytes = (bytes + 63) / 64 * 64;
      data_ = static_cast<char*>(std::aligned_alloc(64, bytes));
      size_ = data_ ? bytes : 0;
    }
    if (!data_) throw std::bad_alloc();
    used_ = 0;
  }
  template <class X>
  X* take(size_t n) {
    X* p = reinterpret_cast<X*>(data_ + used_);
    used_ += (n * sizeof(X) + 63) / 64 * 64;
    return p;
  }
  ~Arena() { std::free(data_); }

 private:
  char* data_ = nullptr;
  size_t size_ = 0, used_ = 0;
};
