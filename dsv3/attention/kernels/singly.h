// Passes over queries one by one, where each has a list of its own or few share one of short blocks: most lanes of a tile
// would multiply in vain.
//
//     forward_one     out and lse of a query: dot products with the keys that its list names, a few of them at a time
//     backward_one    its grad_q, and its part of grad_k and grad_v where one thread has all queries of the keys
//     key_one         grad_k and grad_v of a key over the queries that list it, where another thread has those
//
// The last two add up the same numbers in the same order, so that the number of threads changes no bit. bf16 is widened,
// and softmax weights and their gradients stay in fp32.

constexpr int64_t NAMED = 256;  // rows that are worked on at a time: four of their numbers each fill an eighth of L1

// The keys that a query sees, in ascending order.
struct Keys {
  Walk walk;
  const int32_t* rank;
  int64_t last, at = 0, left = 0;
  int32_t limit = 0;

  Keys(const Problem& p, int64_t b, int64_t h, int64_t t) : walk(p, b, h, t, 1), rank(p.rank) {
    int64_t shared = b * p.shared + h * p.shared / p.heads;
    last = p.keys - p.queries + t;
    if (rank) rank += shared * p.keys, limit = p.limit[shared * p.queries + t];
  }
  // numbers of keys, and where among all lists their blocks stand
  int64_t next(int32_t* to, int64_t* place) {
    int64_t count = 0;
    while (count < NAMED && (left || walk.next(&at, &left)))
      for (; left && count < NAMED; ++at, --left)
        if (at <= last && (!rank || rank[at] <= limit)) place[count] = walk.place(), to[count++] = at;
    return count;
  }
};

// The queries that see a key, in ascending order.
struct Queries {
  const Problem& p;
  const int32_t *block, *stop, *limit;
  int64_t first, lists, at = 0, end = 0, stands = 0;
  int32_t rank = 0;

  Queries(const Problem& p, int64_t b, int64_t h, int64_t key) : p(p), limit(p.limit) {
    int64_t shared = b * p.shared + h * p.shared / p.heads, blocks_k = (p.keys + p.block_k - 1) / p.block_k;
    const int64_t* start = p.inverse_start + shared * blocks_k + key / p.block_k;
    block = p.inverse + start[0], stop = p.inverse + start[1];
    first = key - (p.keys - p.queries), lists = shared * ((p.queries + p.block_q - 1) / p.block_q);
    if (limit) limit += shared * p.queries, rank = p.rank[shared * p.keys + key];
  }
  // numbers of queries, and where among all lists theirs names the block of the key
  int64_t next(int32_t* to, int64_t* place) {
    int64_t count = 0;
    while (count < NAMED && (at < end || block < stop)) {
      if (at == end) {
        if (p.bias) stands = (lists + *block) * p.most + p.inverse_place[block - p.inverse];
        at = *block++ * p.block_q, end = least(at + p.block_q, p.queries);
      }
      for (; at < end && count < NAMED; ++at)
        if (at >= first && (!limit || rank <= limit[at])) place[count] = stands, to[count++] = at;
    }
    return count;
  }
};

// Rows of one head by their numbers.
template <bool HALF>
struct Some {
  const char* from;
  int64_t step, width;
  const int32_t* number;
  int64_t count;

  Some(const Rows& x, int64_t b, int64_t h, int64_t width, const int32_t* number, int64_t count)
      : from(at<HALF>(x, b, h, 0)), step(x.row * (HALF ? 2 : 4)), width(width), number(number), count(count) {}
  INLINE_MEMBER const char* row(int64_t i) const { return from + number[least(i, count - 1)] * step; }
  INLINE_MEMBER void fetch(int64_t i) const {
    for (int64_t c = 0; c < width * (HALF ? 2 : 4); c += 64) __builtin_prefetch(row(i) + c, 0, 3);
  }
  // one . row, for the rows from i on, one a lane
  INLINE_MEMBER Vector with(const float* one, int64_t i) const {
    const char* rows[LANES];
    for (int64_t n = 0; n < LANES; ++n) rows[n] = row(i + n), fetch(i + n + LANES);
    return dots<HALF>(one, rows, width);
  }
  // N vectors of the sum of all rows, weighted, from column c on, onto what is there
  template <int N>
  INLINE_MEMBER void add(const float* weight, int64_t c, float* to) const {
    Vector sum[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sum[n] = load(to + c + LANES * n);
    for (int64_t i = 0; i < count; ++i) {
      const char* x = from + number[i] * step;
      Vector y = spread(weight[i]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n)
        sum[n] = fused(N == 1 && c + LANES > width ? rest<HALF>(x, c, width) : part<HALF>(x, c + LANES * n), y, sum[n]);
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(to + c + LANES * n, sum[n]);
  }
  void add(const float* weight, float* to) const {
    int64_t c = 0;
    for (; c + 4 * LANES <= width; c += 4 * LANES) add<4>(weight, c, to);
    for (; c < width; c += LANES) add<1>(weight, c, to);
  }
};

// A row, weighted, onto those rows of fp32 that are named; `width` is whole vectors.
INLINE void give(const float* row, int64_t width, const int32_t* number, int64_t count, const float* weight, float* to) {
  for (int64_t i = 0; i < count; ++i) {
    float* x = to + number[i] * width;
    Vector y = spread(weight[i]);
    for (int64_t c = 0; c < width; c += LANES) store(x + c, fused(load(row + c), y, load(x + c)));
  }
}

// What is added to a score, of a key and of its block.
INLINE float added(const Problem& p, const float* weight, int64_t place) {
  return (weight ? *weight : 0.0f) + (p.bias ? p.bias[place] : 0.0f);
}
// The same, less what makes weights of scores; in base 2, by steps that no compiler joins into one in some places only.
INLINE float off(const Problem& p, const float* weight, int64_t place, int64_t row) {
  return (added(p, weight, place) - lse_of(p, row)) * LOG2E;
}

template <bool HALF>
static void forward_one_of(const Problem& p, int64_t b, int64_t h, int64_t t) {
  int64_t g = h / (p.heads / p.groups), value = padded(p.value), count;
  const float* weights = p.weights ? p.weights + (b * p.shared + h * p.shared / p.heads) * p.keys : nullptr;
  float query[padded(p.width)], out[value], score[NAMED], top = LOWEST, sum = 0.0f;
  int32_t number[NAMED];
  int64_t place[NAMED];
  as_floats<HALF>(at<HALF>(p.q, b, h, t), p.width, query);
  for (int64_t c = 0; c < value; ++c) out[c] = 0.0f;
  Keys keys(p, b, h, t);
  while ((count = keys.next(number, place))) {
    Some<HALF> k(p.k, b, g, p.width, number, count), v(p.v, b, g, p.value, number, count);
    Vector tops = spread(top), sums = {};
    for (int64_t i = 0; i < count; i += LANES) {
      Vector x = k.with(query, i) * (p.scale * LOG2E);
      if (weighed(p))
        for (int64_t n = i; n < least(i + LANES, count); ++n)
          x[n - i] += added(p, weights ? weights + number[n] : nullptr, place[n]) * LOG2E;
      if (i + LANES > count) x = choose(lanes() < integers(count - i), x, spread(UNSEEN));
      store(score + i, x);
      tops = larger(tops, x);
    }
    float before = top;
    for (int n = 0; n < LANES; ++n) top = tops[n] > top ? tops[n] : top;
    for (int64_t i = 0; i < count; i += LANES) {
      Vector x = power_of_two<false>(load(score + i) - top);
      store(score + i, x);
      sums += x;
    }
    float shrink = power_of_two<false>(spread(before - top))[0];
    sum *= shrink;
    for (int n = 0; n < LANES; ++n) sum += sums[n];
    for (int64_t c = 0; c < value; c += LANES) store(out + c, load(out + c) * shrink);
    v.add(score, out);
  }
  bool none = sum == 0.0f;
  p.lse[(b * p.heads + h) * p.queries + t] = none ? -__builtin_inff() : (top + __builtin_log2f(sum)) * LN2;
  put<HALF>(out, p.value, none ? 0.0f : 1.0f / sum, (char*)at<HALF>(p.out, b, h, t));
}

struct Slopes {  // of the scores between one row and some others; what is added to a score and taken from its slope
  float add[NAMED], delta[NAMED], softmax[NAMED], slope[NAMED];

  template <bool HALF>
  INLINE_MEMBER void find(const float* left, const Some<HALF>& x, const float* right, const Some<HALF>& y,
                          float factor) {
    for (int64_t i = 0; i < x.count; i += LANES) {
      Vector weight = power_of_two<false>(fused(x.with(left, i), spread(factor), load(add + i)));
      store(softmax + i, weight);
      store(slope + i, weight * (y.with(right, i) - load(delta + i)));
    }
  }
};

template <bool HALF>
static void backward_one_of(const Problem& p, int64_t b, int64_t h, int64_t t, float* grad_k, float* grad_v) {
  int64_t g = h / (p.heads / p.groups), width = padded(p.width), value = padded(p.value), count;
  int64_t line = (b * p.heads + h) * p.queries + t, blocks_q = (p.queries + p.block_q - 1) / p.block_q;
  int64_t apart = (b * p.heads + h - (b * p.shared + h * p.shared / p.heads)) * blocks_q * p.most;  // of heads' lists
  const float* weights = p.weights ? p.weights + (b * p.shared + h * p.shared / p.heads) * p.keys : nullptr;
  float query[width], grad[value], grad_q[width];
  int32_t number[NAMED];
  int64_t place[NAMED];
  Slopes of{};
  as_floats<HALF>(at<HALF>(p.q, b, h, t), p.width, query);
  as_floats<HALF>(at<HALF>(p.grad_out, b, h, t), p.value, grad);
  for (int64_t c = 0; c < width; ++c) grad_q[c] = 0.0f;
  Keys keys(p, b, h, t);
  while ((count = keys.next(number, place))) {
    Some<HALF> k(p.k, b, g, p.width, number, count), v(p.v, b, g, p.value, number, count);
    for (int64_t i = 0; i < count; ++i) {
      of.add[i] = off(p, weights ? weights + number[i] : nullptr, place[i], line);
      of.delta[i] = p.delta[line];
    }
    of.find(query, k, grad, v, p.scale * LOG2E);
    k.add(of.slope, grad_q);
    if (p.grad_bias)
      for (int64_t i = 0; i < count; ++i) p.grad_bias[(apart + place[i]) * p.parts + t % p.block_q] += of.slope[i];
    if (!grad_k) continue;
    give(query, width, number, count, of.slope, grad_k);
    give(grad, value, number, count, of.softmax, grad_v);
    if (p.grad_weights)
      for (int64_t i = 0; i < count; ++i) p.grad_weights[(b * p.heads + h) * p.keys + number[i]] += of.slope[i];
  }
  put<HALF>(grad_q, p.width, p.scale, (char*)at<HALF>(p.grad_q, b, h, t));
}

template <bool HALF>
static void key_one_of(const Problem& p, int64_t b, int64_t g, int64_t j) {
  int64_t width = padded(p.width), value = padded(p.value), group = p.heads / p.groups, count;
  float key[width], own[value], grad_k[width], grad_v[value];
  int32_t number[NAMED];
  int64_t place[NAMED];
  Slopes of{};
  as_floats<HALF>(at<HALF>(p.k, b, g, j), p.width, key);
  as_floats<HALF>(at<HALF>(p.v, b, g, j), p.value, own);
  for (int64_t c = 0; c < width; ++c) grad_k[c] = 0.0f;
  for (int64_t c = 0; c < value; ++c) grad_v[c] = 0.0f;
  for (int64_t h = g * group; h < (g + 1) * group; ++h) {
    const float* weight = p.weights ? p.weights + (b * p.shared + h * p.shared / p.heads) * p.keys + j : nullptr;
    float pull = 0.0f;
    int64_t line = (b * p.heads + h) * p.queries;
    Queries queries(p, b, h, j);
    while ((count = queries.next(number, place))) {
      Some<HALF> q(p.q, b, h, p.width, number, count), grad(p.grad_out, b, h, p.value, number, count);
      for (int64_t i = 0; i < count; ++i) {
        of.add[i] = off(p, weight, place[i], line + number[i]);
        of.delta[i] = p.delta[line + number[i]];
      }
      of.find(key, q, own, grad, p.scale * LOG2E);
      q.add(of.slope, grad_k);
      grad.add(of.softmax, grad_v);
      for (int64_t i = 0; i < count; ++i) pull += of.slope[i];
    }
    if (p.grad_weights) p.grad_weights[(b * p.heads + h) * p.keys + j] = pull;
  }
  put<HALF>(grad_k, p.width, p.scale, (char*)at<HALF>(p.grad_k, b, g, j));
  put<HALF>(grad_v, p.value, 1.0f, (char*)at<HALF>(p.grad_v, b, g, j));
}

static void forward_one(const Problem& p, int64_t b, int64_t h, int64_t t) {
  p.half ? forward_one_of<true>(p, b, h, t) : forward_one_of<false>(p, b, h, t);
}
static void backward_one(const Problem& p, int64_t b, int64_t h, int64_t t, float* grad_k, float* grad_v) {
  p.half ? backward_one_of<true>(p, b, h, t, grad_k, grad_v) : backward_one_of<false>(p, b, h, t, grad_k, grad_v);
}
static void key_one(const Problem& p, int64_t b, int64_t g, int64_t j) {
  p.half ? key_one_of<true>(p, b, g, j) : key_one_of<false>(p, b, g, j);
}
