// What becomes of scores before a product stores them: logits, softmax, and the slope of both.

constexpr float UNSEEN = -1e30f, LOWEST = -1e29f;  // finite, so that no difference of the two is NaN

// Which scores of a tile exist. The tile's keys begin `ahead` positions after its first query; KEYS: a row of the tile
// is a key and the lanes are queries, else the other way round.
struct Seen {
  int64_t ahead, columns;
  const int32_t *rank, *limit;
  bool all;

  template <bool KEYS>
  INLINE_MEMBER Ints lanes_seen(int64_t row, int64_t column) const {
    Ints lane = lanes() + (int32_t)column, seen;
    if (KEYS) {
      seen = lane >= integers((int32_t)(ahead + row));
      if (rank) seen &= integers(rank[row]) <= *(const LooseInts*)(limit + column);
    } else {
      int64_t last = least(row - ahead, columns - 1);
      seen = lane <= integers((int32_t)last);
      if (rank) seen &= *(const LooseInts*)(rank + column) <= integers(limit[row]);
    }
    return seen;
  }
};

// Forward: logits in base 2, and the largest of each query so far. Rows are keys.
struct Logits {
  float* to;
  int64_t lead;
  float factor;
  const float* weights;  // per key, in base 2, or nullptr
  Seen seen;
  float* top;
  INLINE_MEMBER Vector start(int64_t, int64_t) const { return Vector{}; }
  INLINE_MEMBER void end(int64_t row, int64_t column, Vector sum) const {
    Vector x = weights ? fused(sum, spread(factor), spread(weights[row])) : sum * factor;
    if (!seen.all) x = choose(seen.lanes_seen<true>(row, column), x, spread(UNSEEN));
    store(to + row * lead + column, x);
    store(top + column, larger(load(top + column), x));
  }
};

// Backward: the weights of softmax from lse. `weights` belong to keys, `lse` to queries, both in base 2.
template <bool HALF, bool KEYS>
struct Softmax {
  float* to;
  int64_t lead;
  float factor;
  const float *weights, *lse;
  Seen seen;
  INLINE_MEMBER Vector start(int64_t, int64_t) const { return Vector{}; }
  INLINE_MEMBER void end(int64_t row, int64_t column, Vector sum) const {
    Vector off = KEYS ? load(lse + column) : spread(lse[row]);
    off = weights ? (KEYS ? spread(weights[row]) : load(weights + column)) - off : -off;
    Vector x = power_of_two<HALF>(fused(sum, spread(factor), off));
    if (!seen.all) x = choose(seen.lanes_seen<KEYS>(row, column), x, Vector{});
    store(to + row * lead + column, x);
  }
};

// Backward: the gradient of the logits, softmax * (grad . v - delta).
template <bool KEYS>
struct Slope {
  const float* softmax;
  float* to;
  int64_t lead;
  const float* delta;
  INLINE_MEMBER Vector start(int64_t, int64_t) const { return Vector{}; }
  INLINE_MEMBER void end(int64_t row, int64_t column, Vector sum) const {
    Vector off = KEYS ? load(delta + column) : spread(delta[row]);
    store(to + row * lead + column, load(softmax + row * lead + column) * (sum - off));
  }
};
