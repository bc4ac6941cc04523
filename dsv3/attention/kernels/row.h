// Passes over a single query, as decoding has: scores as dot products, so that no lane of a tile is wasted.
//
//     span     a query against up to SPAN tiles of its list: largest score, sum of weights, weighted sum of values
//     scores   a query against rows of fp32 by their numbers: what choosing keys looks at
//     best     which of them are the largest
//
// A query's list is cut into spans of the same tiles on every machine, and spans are joined in their order, so that
// the number of threads changes no bit. A score is summed in one order wherever its row stands among others. bf16 is
// widened, and softmax weights stay in fp32. Spans of together.h, which are joined here too, are a tile's products.

constexpr int32_t NOWHERE = -0x7fffffff - 1;

template <bool HALF>
INLINE Vector part(const char* row, int64_t column) {
  return HALF ? widened(*(const LooseHalves*)(row + column * 2)) : load((const float*)row + column);
}
// What is left of a row behind its whole vectors, zeros after it.
template <bool HALF>
INLINE Vector rest(const char* row, int64_t column, int64_t width) {
  if (HALF) {
    Halves x = {};
    __builtin_memcpy(&x, row + column * 2, (width - column) * 2);
    return widened(x);
  }
  Vector x = {};
  __builtin_memcpy(&x, row + column * 4, (width - column) * 4);
  return x;
}

// A row as fp32, zeros up to whole vectors.
template <bool HALF>
INLINE void as_floats(const char* row, int64_t width, float* to) {
  int64_t c = 0;
  for (; c + LANES <= width; c += LANES) store(to + c, part<HALF>(row, c));
  if (c < width) store(to + c, rest<HALF>(row, c, width));
}

// Lane i: the sum over all lanes of x[i]; neighbours are added, then neighbours of those.
INLINE Vector sums_of(const Vector (&x)[LANES]) {
  const Ints even = 2 * lanes(), odd = even + 1;
  Vector y[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) y[i] = x[i];
#pragma GCC unroll 4
  for (int n = LANES / 2; n; n /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i)
      y[i] = __builtin_shuffle(y[2 * i], y[2 * i + 1], even) + __builtin_shuffle(y[2 * i], y[2 * i + 1], odd);
  return y[0];
}

// query . row of as many rows as a vector has lanes; the query is padded with zeros to whole vectors.
template <bool HALF>
INLINE Vector dots(const float* query, const char* const* row, int64_t width) {
  Vector sum[LANES] = {};
  int64_t c = 0;
  for (; c + LANES <= width; c += LANES) {
    Vector x = load(query + c);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) sum[i] = fused(part<HALF>(row[i], c), x, sum[i]);
  }
  if (c < width) {
    Vector x = load(query + c);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) sum[i] = fused(rest<HALF>(row[i], c, width), x, sum[i]);
  }
  return sums_of(sum);
}

static void scores(const float* query, const float* rows, int64_t width, const int32_t* number, int64_t count,
                   float* to) {
  constexpr int64_t AHEAD = 2 * LANES;  // rows asked for before they are read: a list jumps about
  for (int64_t i = 0; i < count; i += LANES) {
    const char* row[LANES];
    for (int64_t n = 0; n < LANES; ++n) {
      row[n] = (const char*)(rows + number[least(i + n, count - 1)] * width);
      const char* later = (const char*)(rows + number[least(i + n + AHEAD, count - 1)] * width);
      for (int64_t c = 0; c < width * 4; c += 64) __builtin_prefetch(later + c, 0, 2);
    }
    Vector found = dots<false>(query, row, width);
    if (i + LANES <= count)
      store(to + i, found);
    else
      for (int64_t n = i; n < count; ++n) to[n] = found[n - i];
  }
}

// A score as an integer that is ordered as scores are, -0 and 0 alike; below all others for -inf and what is no number.
INLINE Ints order(Vector score) {
  Ints bits = (Ints)(score + 0.0f), key = bits ^ ((bits >> 31) & 0x7fffffff);
  return (Ints)(score > spread(-__builtin_inff())) & (key ^ NOWHERE) ^ NOWHERE;
}

INLINE int64_t at_least(const int32_t* key, int64_t count, int32_t bound) {
#ifdef HAS_AVX512
  int64_t found = 0;
  for (int64_t i = 0; i < count; i += LANES)
    found += __builtin_popcount(_mm512_cmpge_epi32_mask(_mm512_loadu_si512(key + i), _mm512_set1_epi32(bound)));
  return found;
#else
  Ints found = {};
  for (int64_t i = 0; i < count; i += LANES) found -= *(const LooseInts*)(key + i) >= bound;
  int64_t sum = 0;
  for (int n = 0; n < LANES; ++n) sum += found[n];
  return sum;
#endif
}

// Halves the range in which the least of the best lies until as many keys reach it as are wanted; of equal ones the
// first are taken.
static int64_t best(const float* score, int64_t count, int64_t most, int32_t* key, int32_t* place) {
  int32_t top = NOWHERE;
  for (int64_t i = 0; i < count; i += LANES) {
    Vector some = spread(-__builtin_inff());
    __builtin_memcpy(&some, score + i, least(LANES, count - i) * 4);
    *(LooseInts*)(key + i) = order(some);
  }
  for (int64_t i = 0; i < count; ++i) top = top > key[i] ? top : key[i];
  int32_t low = NOWHERE + 1;  // at least `most` keys reach low, or all that count; fewer reach high
  int64_t reach = at_least(key, count, low), high = (int64_t)top + 1;
  while (reach > most && low + 1 < high) {
    int32_t middle = (int32_t)((low + high) >> 1);
    int64_t found = at_least(key, count, middle);
    if (found >= most)
      low = middle, reach = found;
    else
      high = middle;
  }
  int64_t equal = reach > most ? most - at_least(key, count, low + 1) : count, kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    bool taken = key[i] > low || (key[i] == low && equal > 0);
    equal -= key[i] == low;
    place[kept] = (int32_t)i;
    kept += taken;
  }
  return kept;
}

// Values from column `c` on, N vectors of them, weighted; two sums of every second key hide the latency of adding.
template <bool HALF, int N>
INLINE void weighted(const Rows& x, const char* from, int64_t count, const float* weight, int64_t c,
                     Vector (&sum)[2][N]) {
  int64_t step = x.row * (HALF ? 2 : 4), j = 0;
  for (; j + 2 <= count; j += 2) {
    Vector low = spread(weight[j]), high = spread(weight[j + 1]);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      sum[0][n] = fused(part<HALF>(from + j * step, c + LANES * n), low, sum[0][n]);
      sum[1][n] = fused(part<HALF>(from + (j + 1) * step, c + LANES * n), high, sum[1][n]);
    }
  }
  if (j < count)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n)
      sum[0][n] = fused(part<HALF>(from + j * step, c + LANES * n), spread(weight[j]), sum[0][n]);
}

struct Pieces {  // tiles of keys, in the order in which they are read
  int64_t first[SPAN], count[SPAN], number;
};

template <bool HALF, int N>
static void values(const Problem& p, int64_t b, int64_t g, const Pieces& tiles, const float* weight, int64_t c,
                   float* out) {
  Vector sum[2][N] = {};
  for (int64_t t = 0; t < tiles.number; weight += tiles.count[t++]) {
    if (c == 0 && t + 1 < tiles.number) fetch<HALF>(p.v, b, g, tiles.first[t + 1], tiles.count[t + 1], p.value);
    weighted<HALF, N>(p.v, at<HALF>(p.v, b, g, tiles.first[t]), tiles.count[t], weight, c, sum);
  }
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) store(out + c + LANES * n, sum[0][n] + sum[1][n]);
}

// The columns that fill no vector.
template <bool HALF>
static void last_values(const Problem& p, int64_t b, int64_t g, const Pieces& tiles, const float* weight, int64_t c,
                        float* out) {
  Vector sum = {};
  for (int64_t t = 0; t < tiles.number; weight += tiles.count[t++])
    for (int64_t j = 0; j < tiles.count[t]; ++j)
      sum = fused(rest<HALF>(at<HALF>(p.v, b, g, tiles.first[t] + j), c, p.value), spread(weight[j]), sum);
  store(out + c, sum);
}

// Scores in base 2 of a span's keys, one tile behind the other, up to a vector more; returns the largest.
template <bool HALF>
static float span_scores(const Problem& p, int64_t b, int64_t h, const Pieces& tiles, const float* query,
                         float* score) {
  int64_t g = h / (p.heads / p.groups), step = p.k.row * (HALF ? 2 : 4);
  const float* weights = p.weights ? p.weights + (b * p.shared + h * p.shared / p.heads) * p.keys : nullptr;
  Vector tops = spread(LOWEST);
  for (int64_t t = 0; t < tiles.number; score += tiles.count[t++]) {
    const char* from = at<HALF>(p.k, b, g, tiles.first[t]);
    if (t + 1 < tiles.number)
      fetch<HALF>(p.k, b, g, tiles.first[t + 1], tiles.count[t + 1], p.width);
    else
      fetch<HALF>(p.v, b, g, tiles.first[0], tiles.count[0], p.value);
    for (int64_t j = 0; j < tiles.count[t]; j += LANES) {
      const char* row[LANES];  // behind the last one it stands again
      for (int64_t n = 0; n < LANES; ++n) row[n] = from + least(j + n, tiles.count[t] - 1) * step;
      Vector x = dots<HALF>(query, row, p.width) * (p.scale * LOG2E);
      if (weights) {
        Vector weight = spread(LOWEST);
        __builtin_memcpy(&weight, weights + tiles.first[t] + j, least(LANES, tiles.count[t] - j) * 4);
        x = fused(weight, spread(LOG2E), x);
      }
      tops = larger(tops, x);
      store(score + j, x);
    }
  }
  float top = LOWEST;
  for (int n = 0; n < LANES; ++n) top = tops[n] > top ? tops[n] : top;
  return top;
}

// `to`: the weighted sum of values, padded to whole vectors, then the largest score in base 2, then the sum of weights.
template <bool HALF>
static void span_of(const Problem& p, int64_t b, int64_t h, int64_t span, float* to) {
  int64_t g = h / (p.heads / p.groups), value = padded(p.value), total = 0;
  Walk walk(p, b, h, 0, 1);
  walk.skip(span * SPAN);
  Pieces tiles{};
  for (int64_t &n = tiles.number; n < SPAN && walk.next(&tiles.first[n], &tiles.count[n]); ++n) total += tiles.count[n];
  float query[padded(p.width)], score[SPAN * TILE + LANES];
  as_floats<HALF>(at<HALF>(p.q, b, h, 0), p.width, query);
  float top = span_scores<HALF>(p, b, h, tiles, query, score), sum = 0.0f;
  store(score + total, spread(UNSEEN));
  Vector sums = {};
  for (int64_t j = 0; j < total; j += LANES) {
    Vector weight = power_of_two<false>(load(score + j) - top);
    store(score + j, weight);
    sums += weight;
  }
  for (int n = 0; n < LANES; ++n) sum += sums[n];
  int64_t c = 0;
  for (; c + 4 * LANES <= p.value; c += 4 * LANES) values<HALF, 4>(p, b, g, tiles, score, c, to);
  for (; c + LANES <= p.value; c += LANES) values<HALF, 1>(p, b, g, tiles, score, c, to);
  if (c < p.value) last_values<HALF>(p, b, g, tiles, score, c, to);
  to[value] = top, to[value + 1] = sum;
}

// out and lse of a head from its spans, one behind the other with `stride` numbers between.
template <bool HALF>
static void join_of(const Problem& p, int64_t b, int64_t h, int64_t t, float* spans, int64_t stride, int64_t count) {
  int64_t value = padded(p.value);
  float top = LOWEST, sum = 0.0f;
  for (int64_t i = 0; i < count; ++i)
    if (spans[i * stride + value] > top) top = spans[i * stride + value];
  for (int64_t i = 0; i < count; ++i) {
    float* one = spans + i * stride;
    float factor = power_of_two<false>(spread(one[value] - top))[0];
    sum += one[value + 1] * factor;
    for (int64_t c = 0; c < value; c += LANES)
      store(spans + c, i ? fused(load(one + c), spread(factor), load(spans + c)) : load(one + c) * factor);
  }
  bool none = sum == 0.0f;
  p.lse[(b * p.heads + h) * p.queries + t] = none ? -__builtin_inff() : (top + __builtin_log2f(sum)) * LN2;
  put<HALF>(spans, p.value, none ? 0.0f : 1.0f / sum, (char*)at<HALF>(p.out, b, h, t));
}

static void span(const Problem& p, int64_t b, int64_t h, int64_t number, float* to) {
  p.half ? span_of<true>(p, b, h, number, to) : span_of<false>(p, b, h, number, to);
}
static void join(const Problem& p, int64_t b, int64_t h, int64_t t, float* spans, int64_t stride, int64_t count) {
  p.half ? join_of<true>(p, b, h, t, spans, stride, count) : join_of<false>(p, b, h, t, spans, stride, count);
}
