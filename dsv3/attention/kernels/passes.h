// The passes of block-sparse attention over tiles of 64 queries and 64 keys.
//
//     forward      scores of a tile of queries against up to LONG listed keys into a buffer in L2, keys as rows, so that
//                  k is read as it lies; their maximum on the way; then 2^(score - max), its sum, and the product with v
//     key_tile     grad_k and grad_v of a tile of keys over all queries that list it (and, in the same sweep, grad_q)
//     query_tile   grad_q of a tile of queries over the keys that it lists, where another thread has the tile of keys
//
// grad_q comes out the same to the bit either way: each of its numbers is one chain of additions over the tiles of keys
// in ascending order, within a tile in one order, and all that goes into it is computed by the same chains.

constexpr int64_t LONG = 512;  // keys whose scores are kept at a time: 64 x 512 of them are 128 KiB of the L2 cache
#ifdef HAS_AMX
static_assert(TILE / 2 <= SHORT, "a tile's products along the rows are done in registers of matrices");
#endif

// ---- where things lie

template <bool HALF>
INLINE const char* at(const Rows& x, int64_t b, int64_t h, int64_t row) {
  return x.data + (b * x.batch + h * x.head + row * x.row) * (HALF ? 2 : 4);
}

struct Matrix {
  const Word* data;
  int64_t lead;
};

// Rows as factor A: words that neighbours along the width share. As they lie, or copied where a row has half a word.
template <bool HALF>
static Matrix as_left(const Rows& x, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t width, Word* room) {
  const char* from = at<HALF>(x, b, h, first);
  if (!HALF) return {(const Word*)from, x.row};
  if (width % 2 == 0 && x.row % 2 == 0 && (uintptr_t)from % 4 == 0) return {(const Word*)from, x.row / 2};
  int64_t lead = words<HALF>(width);
  for (int64_t i = 0; i < rows; ++i) {
    room[i * lead + lead - 1] = 0;
    __builtin_memcpy(room + i * lead, from + i * x.row * 2, width * 2);
  }
  return {room, lead};
}

// Ask for rows that will be read next: a list jumps about, and the processor foresees runs alone.
template <bool HALF>
INLINE void fetch(const Rows& x, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t width) {
  const char* from = at<HALF>(x, b, h, first);
  int64_t size = HALF ? 2 : 4;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < width * size; c += 64) __builtin_prefetch(from + i * x.row * size + c, 0, 2);
}

// Rows as factor B of a product along the rows: bf16 in pairs of rows, fp32 as it lies where rows are whole vectors.
template <bool HALF>
static Matrix as_right(const Rows& x, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t width, Word* room) {
  const char* from = at<HALF>(x, b, h, first);
  int64_t lead = padded(width);
  if (!HALF) {
    if (width == lead) return {(const Word*)from, x.row};
    for (int64_t i = 0; i < rows; ++i) {
      __builtin_memset(room + i * lead, 0, lead * 4);
      __builtin_memcpy(room + i * lead, from + i * x.row * 4, width * 4);
    }
    return {room, lead};
  }
  const uint16_t* x16 = (const uint16_t*)from;
  int64_t whole = width / LANES * LANES;
  for (int64_t i = 0; i < rows; i += 2) {
    const uint16_t *low = x16 + i * x.row, *high = low + x.row;
    Word* to = room + i / 2 * lead;
    if (i + 1 == rows) {
      for (int64_t c = 0; c < lead; ++c) to[c] = c < width ? low[c] : 0;
      continue;
    }
    zip(low, high, whole, to);
    for (int64_t c = whole; c < lead; ++c) to[c] = c < width ? low[c] | (Word)high[c] << 16 : 0;
  }
  return {room, lead};
}

// Rows as factor B of a product along the width: transposed, zeros up to `lead`.
template <bool HALF>
static void turned(const Rows& x, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t width, int64_t lead,
                   Word* to) {
  int64_t count = words<HALF>(width), done = 0;
  const Word* whole = (const Word*)at<HALF>(x, b, h, first);
  if (!HALF || (width % 2 == 0 && x.row % 2 == 0 && (uintptr_t)whole % 4 == 0)) {
    done = count / LANES * LANES;
    turn_rows(whole, HALF ? x.row / 2 : x.row, rows, done, to, lead);
  }
  __builtin_memset(to + done * lead, 0, (count - done) * lead * 4);
  for (int64_t i = 0; i < rows; ++i) {
    const char* from = at<HALF>(x, b, h, first + i);
    if (!HALF) {
      for (int64_t c = done; c < count; ++c) to[c * lead + i] = ((const Word*)from)[c];
      continue;
    }
    const uint16_t* x16 = (const uint16_t*)from;
    for (int64_t c = 2 * done; c + 1 < width; c += 2) to[c / 2 * lead + i] = x16[c] | (Word)x16[c + 1] << 16;
    if (width % 2) to[width / 2 * lead + i] = x16[width - 1];
  }
}

// ---- which tiles

// A tile of queries and its list; walks the tiles of keys that some of its queries may see, in ascending order.
struct Walk {
  const int32_t* blocks;
  int64_t count, last, size, keys, block, begin, list;  // list: where it begins among all

  Walk(const Problem& p, int64_t b, int64_t h, int64_t first, int64_t rows) : block(0), begin(0), list(0) {
    last = p.keys - p.queries + first + rows - 1;
    size = p.block_k;
    keys = p.keys;
    if (p.listed) {
      int64_t blocks_q = (p.queries + p.block_q - 1) / p.block_q;
      int64_t number = (b * p.shared + h * p.shared / p.heads) * blocks_q + first / p.block_q;
      list = number * p.most;
      blocks = p.listed + list;
      count = p.counts[number];
    } else {
      blocks = nullptr;
      count = last / size + 1;
    }
  }
  bool next(int64_t* first, int64_t* length) {
    for (; block < count; ++block, begin = 0) {
      int64_t start = (blocks ? blocks[block] : block) * size, from = start + begin;
      int64_t stop = least(start + size, least(keys, last + 1));
      if (begin >= size || from >= stop) continue;
      *first = from;
      // the whole tile though queries see less: its shape must not depend on the tile of queries
      *length = least(TILE, least(start + size, keys) - from);
      begin += TILE;
      return true;
    }
    return false;
  }
  int64_t place() const { return list + block; }  // of the last tile's block among all lists
  void skip(int64_t tiles) {
    if (size <= TILE)
      block += tiles;  // each block is one
    else
      for (int64_t first, length; tiles > 0 && next(&first, &length);) --tiles;
  }
};

INLINE bool weighed(const Problem& p) { return p.weights || p.bias; }

struct KeyFacts {  // of a tile of keys, padded so that vectors may be read; its block stands at `place` of all lists
  float weight[TILE];
  int32_t rank[TILE];
};
INLINE void read_keys(const Problem& p, int64_t b, int64_t h, int64_t first, int64_t count, int64_t place,
                      KeyFacts& facts) {
  int64_t row = (b * p.shared + h * p.shared / p.heads) * p.keys + first;
  float bias = p.bias ? p.bias[place] * LOG2E : 0.0f;
  for (int64_t i = 0; i < TILE; ++i) {
    if (weighed(p)) facts.weight[i] = (p.weights && i < count ? p.weights[row + i] * LOG2E : 0.0f) + bias;
    if (p.rank) facts.rank[i] = i < count ? p.rank[row + i] : 0;
  }
}
// Of a query that sees nothing any finite number, since its weights are 0.
INLINE float lse_of(const Problem& p, int64_t row) { return p.lse[row] > -__builtin_inff() ? p.lse[row] : 0.0f; }
struct QueryFacts {
  float lse[TILE], delta[TILE];
  int32_t limit[TILE];
};
INLINE void read_queries(const Problem& p, int64_t b, int64_t h, int64_t first, int64_t rows, bool known,
                         QueryFacts& facts) {
  int64_t row = (b * p.heads + h) * p.queries + first;
  int64_t shared = (b * p.shared + h * p.shared / p.heads) * p.queries + first;
  for (int64_t i = 0; i < TILE; ++i) {
    bool inside = i < rows;
    if (known) facts.lse[i] = inside ? lse_of(p, row + i) * LOG2E : 0.0f;
    if (known) facts.delta[i] = inside ? p.delta[row + i] : 0.0f;
    if (p.limit) facts.limit[i] = inside ? p.limit[shared + i] : 0;
  }
}
INLINE Seen seen(const Problem& p, int64_t first_q, int64_t first_k, int64_t count, const KeyFacts& keys,
                 const QueryFacts& queries) {
  int64_t ahead = first_k - (p.keys - p.queries + first_q);
  bool all = ahead + count <= 1 && !p.rank && count % WHOLE == 0;
  return {ahead, count, p.rank ? keys.rank : nullptr, queries.limit, all};
}

// One row of fp32, scaled, into the call's format.
template <bool HALF>
INLINE void put(const float* from, int64_t width, float factor, char* to) {
  int64_t c = 0;
  for (; c + LANES <= width; c += LANES) {
    Vector x = load(from + c) * factor;
    if (HALF)
      *(LooseHalves*)((uint16_t*)to + c) = halves(x);
    else
      store((float*)to + c, x);
  }
  if (c == width) return;
  Vector x = {};
  for (int64_t i = c; i < width; ++i) x[i - c] = from[i] * factor;
  Halves y = halves(x);
  if (HALF)
    __builtin_memcpy((uint16_t*)to + c, &y, (width - c) * 2);
  else
    __builtin_memcpy((float*)to + c, &x, (width - c) * 4);
}

// ---- forward

template <bool HALF>
INLINE void weigh(float* score, int64_t count, int64_t lead, const float* top, float* sum, Word* pair) {
  for (int64_t n = 0; n < lead; n += LANES) {
    Vector highest = load(top + n), total = {};
    int64_t j = 0;
    for (; j + 2 <= count; j += 2) {
      Vector low = power_of_two<HALF>(load(score + j * lead + n) - highest);
      Vector high = power_of_two<HALF>(load(score + (j + 1) * lead + n) - highest);
      total += low + high;
      if (HALF) {
        *(LooseBits*)(pair + j / 2 * lead + n) = pairs(low, high);
      } else {
        store(score + j * lead + n, low);
        store(score + (j + 1) * lead + n, high);
      }
    }
    if (j < count) {
      Vector low = power_of_two<HALF>(load(score + j * lead + n) - highest);
      total += low;
      if (HALF)
        *(LooseBits*)(pair + j / 2 * lead + n) = pairs(low, Vector{});
      else
        store(score + j * lead + n, low);
    }
    store(sum + n, load(sum + n) + total);
  }
}

template <bool HALF>
static void forward_of(const Problem& p, int64_t b, int64_t h, int64_t first, int64_t rows, char* scratch) {
  Matrices<HALF> registers;
  Scratch room{scratch};
  int64_t lead = padded(rows), g = h / (p.heads / p.groups), value = padded(p.value), deep = words<HALF>(p.width);
  Word* q = room.take<Word>(deep * lead);
  float* out = room.take<float>(TILE * value);
  Word* left = room.take<Word>(HALF ? TILE * deep : 0);
  Word* right = room.take<Word>(TILE * value);
  Word* pair = room.take<Word>(HALF ? TILE / 2 * lead : 0);
  float* score = room.take<float>(0);  // the rest: up to LONG rows
  float top[TILE], sum[TILE], factor[TILE];
  KeyFacts keys;
  QueryFacts queries;
  for (int64_t i = 0; i < TILE; ++i) top[i] = LOWEST, sum[i] = 0.0f;
  turned<HALF>(p.q, b, h, first, rows, p.width, lead, q);
  read_queries(p, b, h, first, rows, false, queries);
  Walk walk(p, b, h, first, rows);
  int64_t begins[LONG / LANES], counts[LONG / LANES], places[LONG / LANES];
  bool more = true, fresh = true;
  while (more) {
    float before[TILE];
    for (int64_t i = 0; i < TILE; ++i) before[i] = top[i];
    int64_t tiles = 0, filled = 0;
    while (tiles < LONG / LANES && filled + TILE <= LONG && (more = walk.next(&begins[tiles], &counts[tiles])))
      places[tiles] = walk.place(), filled += counts[tiles++];
    filled = 0;
    for (int64_t t = 0; t < tiles; ++t) {
      int64_t begin = begins[t], count = counts[t];
      if (t + 1 < tiles)
        fetch<HALF>(p.k, b, g, begins[t + 1], counts[t + 1], p.width);
      else
        fetch<HALF>(p.v, b, g, begins[0], counts[0], p.value);
      Matrix k = as_left<HALF>(p.k, b, g, begin, count, p.width, left);
      if (weighed(p) || p.rank) read_keys(p, b, h, begin, count, places[t], keys);
      Logits logits{score + filled * lead, lead,
                    p.scale * LOG2E,       weighed(p) ? keys.weight : nullptr,
                    seen(p, first, begin, count, keys, queries),
                    top};
      product<HALF, true>(count, lead, deep, k.data, k.lead, q, lead, logits);
      filled += count;
    }
    if (!tiles) break;
    if (!fresh) {
      for (int64_t n = 0; n < lead; n += LANES) {
        Vector shrink = power_of_two<HALF>(load(before + n) - load(top + n));
        store(factor + n, shrink);
        store(sum + n, load(sum + n) * shrink);
      }
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t c = 0; c < value; c += LANES) store(out + i * value + c, load(out + i * value + c) * factor[i]);
    }
    filled = 0;
    for (int64_t t = 0; t < tiles; ++t, fresh = false) {
      float* weight = score + filled * lead;
      if (t + 1 < tiles) fetch<HALF>(p.v, b, g, begins[t + 1], counts[t + 1], p.value);
      weigh<HALF>(weight, counts[t], lead, top, sum, pair);
      Matrix v = as_right<HALF>(p.v, b, g, begins[t], counts[t], p.value, right);
      product<HALF, false>(rows, value, words<HALF>(counts[t]), HALF ? pair : (const Word*)weight, lead, v.data, v.lead,
                           Add{out, value, fresh});
      filled += counts[t];
    }
  }
  if (fresh) __builtin_memset(out, 0, TILE * value * 4);
  for (int64_t i = 0; i < rows; ++i) {
    bool none = sum[i] == 0.0f;
    p.lse[(b * p.heads + h) * p.queries + first + i] =
        none ? -__builtin_inff() : (top[i] + __builtin_log2f(sum[i])) * LN2;
    factor[i] = none ? 0.0f : 1.0f / sum[i];
    char* to = (char*)at<HALF>(p.out, b, h, first + i);
    put<HALF>(out + i * value, p.value, factor[i], to);
  }
}

// ---- backward

template <bool HALF>
static void delta_of(const Problem& p, int64_t b, int64_t h, int64_t first, int64_t rows) {
  for (int64_t i = 0; i < rows; ++i) {
    const char *x = at<HALF>(p.out, b, h, first + i), *y = at<HALF>(p.grad_out, b, h, first + i);
    Vector sums = {};
    float sum = 0.0f;
    int64_t c = 0;
    for (; c + LANES <= p.value; c += LANES)
      sums += HALF ? widened(*(const LooseHalves*)(x + c * 2)) * widened(*(const LooseHalves*)(y + c * 2))
                   : load((const float*)x + c) * load((const float*)y + c);
    for (; c < p.value; ++c)
      sum += HALF ? number((Word)((const uint16_t*)x)[c] << 16) * number((Word)((const uint16_t*)y)[c] << 16)
                  : ((const float*)x)[c] * ((const float*)y)[c];
    for (int n = 0; n < LANES; ++n) sum += sums[n];
    p.delta[(b * p.heads + h) * p.queries + first + i] = sum;
  }
}

// A tile of numbers as bf16: pairs along the rows, and the rows themselves, where wanted.
static void narrowed(const float* x, int64_t rows, int64_t lead, Word* pair, uint16_t* row) {
  for (int64_t i = 0; i < rows; i += 2)
    for (int64_t n = 0; n < lead; n += LANES) {
      Vector low = load(x + i * lead + n), high = i + 1 < rows ? load(x + (i + 1) * lead + n) : Vector{};
      if (pair) *(LooseBits*)(pair + i / 2 * lead + n) = pairs(low, high);
      if (!row) continue;
      *(LooseHalves*)(row + i * lead + n) = halves(low);
      if (i + 1 < rows) *(LooseHalves*)(row + (i + 1) * lead + n) = halves(high);
    }
}

// The sum of `count` numbers, whole vectors of them.
static float total(const float* x, int64_t count) {
  Vector sums = {};
  float sum = 0.0f;
  for (int64_t i = 0; i < count; i += LANES) sums += load(x + i);
  for (int n = 0; n < LANES; ++n) sum += sums[n];
  return sum;
}

template <bool HALF>
static void key_tile_of(const Problem& p, int64_t b, int64_t g, int64_t first, int64_t count, float* grad_q,
                        int64_t stride, char* scratch) {
  Matrices<HALF> registers;
  Scratch room{scratch};
  int64_t lead = padded(count), width = padded(p.width), value = padded(p.value);
  int64_t deep_k = words<HALF>(p.width), deep_v = words<HALF>(p.value), group = p.heads / p.groups;
  Word* k_turned = room.take<Word>(deep_k * lead);
  Word* v_turned = room.take<Word>(deep_v * lead);
  Word* k_room = room.take<Word>(TILE * width);
  Word* q_room = room.take<Word>(TILE * width);
  Word* o_room = room.take<Word>(TILE * value);
  Word* left = room.take<Word>(TILE * (width > value ? width : value));
  float* softmax = room.take<float>(TILE * lead);
  float* slope = room.take<float>(TILE * lead);
  Word* soft_pair = room.take<Word>(TILE / 2 * lead);
  Word* slope_pair = room.take<Word>(TILE / 2 * lead);
  uint16_t* slope_row = room.take<uint16_t>(TILE * lead);
  float* grad_k = room.take<float>(TILE * width);
  float* grad_v = room.take<float>(TILE * value);
  KeyFacts keys;
  QueryFacts queries;
  turned<HALF>(p.k, b, g, first, count, p.width, lead, k_turned);
  turned<HALF>(p.v, b, g, first, count, p.value, lead, v_turned);
  Matrix k{nullptr, 0};
  if (grad_q) k = as_right<HALF>(p.k, b, g, first, count, p.width, k_room);
  int64_t offset = p.keys - p.queries, blocks_q = (p.queries + p.block_q - 1) / p.block_q;
  int64_t blocks_k = (p.keys + p.block_k - 1) / p.block_k;
  bool fresh = true;
  for (int64_t h = g * group; h < (g + 1) * group; ++h) {
    if (!p.bias && (p.weights || p.rank)) read_keys(p, b, h, first, count, 0, keys);
    float pull[TILE] = {};
    int64_t from = (first > offset ? first - offset : 0) / p.block_q, stop = blocks_q;
    if (p.listed) {
      const int64_t* start = p.inverse_start + (b * p.shared + h * p.shared / p.heads) * blocks_k + first / p.block_k;
      from = start[0], stop = start[1];
    }
    for (int64_t at_list = from; at_list < stop; ++at_list) {
      int64_t block = p.listed ? p.inverse[at_list] : at_list;
      int64_t end = least((block + 1) * p.block_q, p.queries);
      int64_t place = p.bias ? block * p.most + p.inverse_place[at_list] : 0;
      if (p.bias)
        read_keys(p, b, h, first, count, (b * p.shared + h * p.shared / p.heads) * blocks_q * p.most + place, keys);
      for (int64_t row = block * p.block_q; row < end; row += TILE) {
        int64_t rows = least(TILE, end - row);
        if (offset + row + rows - 1 < first) continue;
        int64_t block_after = at_list + 1 < stop ? (p.listed ? p.inverse[at_list + 1] : at_list + 1) : blocks_q;
        int64_t after = row + TILE < end ? row + TILE : block_after * p.block_q;
        if (after < p.queries) {
          int64_t rows_after = least(TILE, p.queries - after);
          fetch<HALF>(p.q, b, h, after, rows_after, p.width);
          fetch<HALF>(p.grad_out, b, h, after, rows_after, p.value);
          if (grad_q) {
            Rows sums{(char*)(grad_q + (h - g * group) * p.queries * stride), 0, 0, stride};
            fetch<false>(sums, 0, 0, after, rows_after, p.width);
          }
        }
        read_queries(p, b, h, row, rows, true, queries);
        Seen which = seen(p, row, first, count, keys, queries);
        Matrix q = as_left<HALF>(p.q, b, h, row, rows, p.width, left);
        product<HALF, true>(rows, lead, deep_k, q.data, q.lead, k_turned, lead,
                            Softmax<HALF, false>{softmax, lead, p.scale * LOG2E, weighed(p) ? keys.weight : nullptr,
                                                 queries.lse, which});
        Matrix o = as_left<HALF>(p.grad_out, b, h, row, rows, p.value, left);
        product<HALF, true>(rows, lead, deep_v, o.data, o.lead, v_turned, lead,
                            Slope<false>{softmax, slope, lead, queries.delta});
        if (HALF) {
          narrowed(softmax, rows, lead, soft_pair, nullptr);
          narrowed(slope, rows, lead, slope_pair, grad_q ? slope_row : nullptr);
        }
        o = as_right<HALF>(p.grad_out, b, h, row, rows, p.value, o_room);
        product<HALF, false>(count, value, words<HALF>(rows), HALF ? soft_pair : (const Word*)softmax, lead, o.data,
                             o.lead, Add{grad_v, value, fresh});
        q = as_right<HALF>(p.q, b, h, row, rows, p.width, q_room);
        product<HALF, false>(count, width, words<HALF>(rows), HALF ? slope_pair : (const Word*)slope, lead, q.data,
                             q.lead, Add{grad_k, width, fresh});
        if (grad_q)
          product<HALF, true>(rows, width, words<HALF>(count), HALF ? (const Word*)slope_row : (const Word*)slope,
                              HALF ? lead / 2 : lead, k.data, k.lead,
                              Add{grad_q + ((h - g * group) * p.queries + row) * stride, stride, false});
        if (p.grad_weights)
          for (int64_t i = 0; i < rows; ++i)
            for (int64_t n = 0; n < lead; n += LANES) store(pull + n, load(pull + n) + load(slope + i * lead + n));
        if (p.grad_bias) {
          int64_t part = first % p.block_k / TILE;
          p.grad_bias[((b * p.heads + h) * blocks_q * p.most + place) * p.parts + part] += total(slope, rows * lead);
        }
        fresh = false;
      }
    }
    if (p.grad_weights)
      for (int64_t i = 0; i < count; ++i) p.grad_weights[(b * p.heads + h) * p.keys + first + i] = pull[i];
  }
  if (fresh) {
    __builtin_memset(grad_k, 0, TILE * width * 4);
    __builtin_memset(grad_v, 0, TILE * value * 4);
  }
  for (int64_t i = 0; i < count; ++i) {
    put<HALF>(grad_k + i * width, p.width, p.scale, (char*)at<HALF>(p.grad_k, b, g, first + i));
    put<HALF>(grad_v + i * value, p.value, 1.0f, (char*)at<HALF>(p.grad_v, b, g, first + i));
  }
}

template <bool HALF>
static void query_tile_of(const Problem& p, int64_t b, int64_t h, int64_t first, int64_t rows, float* grad_q,
                          int64_t stride, char* scratch) {
  Matrices<HALF> registers;
  Scratch room{scratch};
  int64_t lead = padded(rows), width = padded(p.width), value = padded(p.value), g = h / (p.heads / p.groups);
  int64_t deep_k = words<HALF>(p.width), deep_v = words<HALF>(p.value);
  Word* q_turned = room.take<Word>(deep_k * lead);
  Word* o_turned = room.take<Word>(deep_v * lead);
  Word* k_room = room.take<Word>(TILE * width);
  Word* left = room.take<Word>(TILE * (width > value ? width : value));
  float* softmax = room.take<float>(TILE * lead);
  float* slope = room.take<float>(TILE * lead);
  Word* slope_pair = room.take<Word>(TILE / 2 * lead);
  KeyFacts keys;
  QueryFacts queries;
  turned<HALF>(p.q, b, h, first, rows, p.width, lead, q_turned);
  turned<HALF>(p.grad_out, b, h, first, rows, p.value, lead, o_turned);
  read_queries(p, b, h, first, rows, true, queries);
  Walk walk(p, b, h, first, rows);
  int64_t begin, count;
  while (walk.next(&begin, &count)) {
    if (weighed(p) || p.rank) read_keys(p, b, h, begin, count, walk.place(), keys);
    Seen which = seen(p, first, begin, count, keys, queries);
    Matrix k = as_left<HALF>(p.k, b, g, begin, count, p.width, left);
    product<HALF, true>(count, lead, deep_k, k.data, k.lead, q_turned, lead,
                        Softmax<HALF, true>{softmax, lead, p.scale * LOG2E, weighed(p) ? keys.weight : nullptr,
                                            queries.lse, which});
    Matrix v = as_left<HALF>(p.v, b, g, begin, count, p.value, left);
    product<HALF, true>(count, lead, deep_v, v.data, v.lead, o_turned, lead,
                        Slope<true>{softmax, slope, lead, queries.delta});
    if (HALF) narrowed(slope, count, lead, slope_pair, nullptr);
    k = as_right<HALF>(p.k, b, g, begin, count, p.width, k_room);
    product<HALF, false>(rows, width, words<HALF>(count), HALF ? slope_pair : (const Word*)slope, lead, k.data, k.lead,
                         Add{grad_q, stride, false});
  }
}

static int64_t room_of(const Problem& p) {
  int64_t width = padded(p.width), value = padded(p.value), lead = TILE;
  int64_t longest = p.listed ? least(LONG, p.most * padded(p.block_k)) : least(LONG, padded(p.keys));
  int64_t forward = width * lead + (longest + TILE) * lead + TILE * (width + 2 * value) + TILE / 2 * lead;
  int64_t backward = TILE * (7 * width + 6 * value) + 5 * TILE * lead;
  return ((forward > backward ? forward : backward) * 4 + 32 * 64 + 63) / 64 * 64;
}

static void forward(const Problem& p, int64_t b, int64_t h, int64_t first, int64_t rows, char* scratch) {
  p.half ? forward_of<true>(p, b, h, first, rows, scratch) : forward_of<false>(p, b, h, first, rows, scratch);
}
static void delta(const Problem& p, int64_t b, int64_t h, int64_t first, int64_t rows) {
  p.half ? delta_of<true>(p, b, h, first, rows) : delta_of<false>(p, b, h, first, rows);
}
static void key_tile(const Problem& p, int64_t b, int64_t g, int64_t first, int64_t count, float* grad_q,
                     int64_t stride, char* scratch) {
  p.half ? key_tile_of<true>(p, b, g, first, count, grad_q, stride, scratch)
         : key_tile_of<false>(p, b, g, first, count, grad_q, stride, scratch);
}
static void query_tile(const Problem& p, int64_t b, int64_t h, int64_t first, int64_t rows, float* grad_q,
                       int64_t stride, char* scratch) {
  p.half ? query_tile_of<true>(p, b, h, first, rows, grad_q, stride, scratch)
         : query_tile_of<false>(p, b, h, first, rows, grad_q, stride, scratch);
}
static void store_rows(const Problem& p, const float* from, int64_t stride, const Rows& to, int64_t b, int64_t h,
                       int64_t first, int64_t rows, int64_t width, float factor) {
  for (int64_t i = 0; i < rows; ++i)
    p.half ? put<true>(from + i * stride, width, factor, (char*)at<true>(to, b, h, first + i))
           : put<false>(from + i * stride, width, factor, (char*)at<false>(to, b, h, first + i));
}
