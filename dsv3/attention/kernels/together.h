// One query in many heads that share keys and a list, as the heads of a latent do: they take the place of a tile's
// queries, so that a key is read once for all of them instead of once for each.

struct Gathered {  // rows of one head, which lie behind each other or have been put there
  Rows rows;
  int64_t first;
};

// Rows by their numbers, in place where these follow each other.
template <bool HALF>
static Gathered gathered(const Rows& x, int64_t b, int64_t g, const int32_t* number, int64_t count, int64_t width,
                         char* room) {
  if (number[count - 1] - number[0] == count - 1) return {x, number[0]};
  constexpr int64_t AHEAD = 4;
  int64_t bytes = width * (HALF ? 2 : 4);
  for (int64_t i = 0; i < count; ++i) {
    const char* later = at<HALF>(x, b, g, number[least(i + AHEAD, count - 1)]);
    for (int64_t c = 0; c < bytes; c += 64) __builtin_prefetch(later + c, 0, 3);
    __builtin_memcpy(room + i * bytes, at<HALF>(x, b, g, number[i]), bytes);
  }
  return {{room, 0, 0, width}, 0};
}

// The heads from `head` on, all of one group, against keys by their numbers, ascending; for each head into `to`,
// `stride` apart, what a span leaves. Nothing is seen where there are no keys.
template <bool HALF>
static void together_of(const Problem& p, int64_t b, int64_t head, int64_t heads, int64_t t, const int32_t* number,
                        int64_t count, float* to, int64_t stride, char* scratch) {
  Matrices<HALF> registers;
  Scratch room{scratch};
  int64_t lead = padded(heads), value = padded(p.value), g = head / (p.heads / p.groups), deep = words<HALF>(p.width);
  Word* q = room.take<Word>(deep * lead);
  float* out = room.take<float>(TILE * value);
  char* rows = room.take<char>(TILE * (p.width > p.value ? p.width : p.value) * 4);
  Word* left = room.take<Word>(HALF ? TILE * deep : 0);
  Word* right = room.take<Word>(TILE * value);
  Word* pair = room.take<Word>(HALF ? TILE / 2 * lead : 0);
  float* score = room.take<float>(SPAN * TILE * lead);
  const float* weights = p.weights ? p.weights + (b * p.shared + head * p.shared / p.heads) * p.keys : nullptr;
  float top[TILE], sum[TILE], weight[TILE];
  for (int64_t i = 0; i < TILE; ++i) top[i] = LOWEST, sum[i] = 0.0f;
  if (count <= 0) __builtin_memset(out, 0, TILE * value * 4);
  turned<HALF>(Rows{p.q.data, p.q.batch, p.q.row, p.q.head}, b, t, head, heads, p.width, lead, q);
  for (int64_t j = 0; j < count; j += TILE) {
    int64_t here = least(TILE, count - j);
    for (int64_t i = 0; weights && i < here; ++i) weight[i] = weights[number[j + i]] * LOG2E;
    Gathered k = gathered<HALF>(p.k, b, g, number + j, here, p.width, rows);
    Matrix a = as_left<HALF>(k.rows, b, g, k.first, here, p.width, left);
    Seen all{0, here, nullptr, nullptr, true};
    product<HALF, true>(here, lead, deep, a.data, a.lead, q, lead,
                        Logits{score + j * lead, lead, p.scale * LOG2E, weights ? weight : nullptr, all, top});
  }
  for (int64_t j = 0; j < count; j += TILE) {
    int64_t here = least(TILE, count - j);
    weigh<HALF>(score + j * lead, here, lead, top, sum, pair);
    Gathered v = gathered<HALF>(p.v, b, g, number + j, here, p.value, rows);
    Matrix w = as_right<HALF>(v.rows, b, g, v.first, here, p.value, right);
    product<HALF, false>(heads, value, words<HALF>(here), HALF ? pair : (const Word*)(score + j * lead), lead, w.data,
                         w.lead, Add{out, value, j == 0});
  }
  for (int64_t i = 0; i < heads; ++i) {
    __builtin_memcpy(to + i * stride, out + i * value, value * 4);
    to[i * stride + value] = top[i], to[i * stride + value + 1] = sum[i];
  }
}

// One query's rows of some heads. In fp32, where products read them as they lie, they are put behind each other, padded.
template <bool HALF>
static Rows of_heads(const Rows& x, int64_t b, int64_t head, int64_t heads, int64_t t, int64_t width, Word* room) {
  if (HALF) return {(char*)at<HALF>(x, b, head, t), 0, 0, x.head};
  int64_t lead = padded(width);
  for (int64_t i = 0; i < heads; ++i) {
    __builtin_memcpy(room + i * lead, at<HALF>(x, b, head + i, t), width * 4);
    __builtin_memset(room + i * lead + width, 0, (lead - width) * 4);
  }
  return {(char*)room, 0, 0, lead};
}

// What a product adds to rows by their numbers. Registers of matrices cannot begin with rows that lie apart, so sums begin
// with zero on every processor.
struct Give {
  float* to;
  int64_t lead;
  const int32_t* number;
  INLINE_MEMBER Vector start(int64_t, int64_t) const { return Vector{}; }
  INLINE_MEMBER void end(int64_t row, int64_t column, Vector sum) const {
    float* x = to + number[row] * lead + column;
    store(x, load(x) + sum);
  }
};

struct HeadFacts {  // of one query; heads that pad the tile weigh nothing
  float lse[TILE], delta[TILE];

  HeadFacts(const Problem& p, int64_t b, int64_t head, int64_t heads, int64_t t) {
    for (int64_t i = 0; i < TILE; ++i) {
      int64_t row = (b * p.heads + head + i) * p.queries + t;
      lse[i] = i < heads ? lse_of(p, row) * LOG2E : -LOWEST;
      delta[i] = i < heads ? p.delta[row] : 0.0f;
    }
  }
};

// The gradients of one query in the heads from `head` on, all of one group: grad_q where `own`; where grad_k is given,
// what the keys have from it is added to those rows of whole vectors.
template <bool HALF>
static void together_back_of(const Problem& p, int64_t b, int64_t head, int64_t heads, int64_t t, const int32_t* number,
                             int64_t count, bool own, float* grad_k, float* grad_v, char* scratch) {
  Matrices<HALF> registers;
  Scratch room{scratch};
  int64_t lead = padded(heads), width = padded(p.width), value = padded(p.value), g = head / (p.heads / p.groups);
  int64_t deep_k = words<HALF>(p.width), deep_v = words<HALF>(p.value), wide = width > value ? width : value;
  Word* q_turned = room.take<Word>(deep_k * lead);
  Word* o_turned = room.take<Word>(deep_v * lead);
  Word* q_right = room.take<Word>(TILE * width);
  Word* o_right = room.take<Word>(TILE * value);
  char* k_rows = room.take<char>(TILE * p.width * (HALF ? 2 : 4));
  char* v_rows = room.take<char>(TILE * p.value * (HALF ? 2 : 4));
  Word* left = room.take<Word>(HALF ? TILE * words<HALF>(wide) : 0);
  Word* right = room.take<Word>(TILE * width);
  float* softmax = room.take<float>(TILE * lead);
  float* slope = room.take<float>(TILE * lead);
  Word* pair = room.take<Word>(HALF ? TILE / 2 * lead : 0);
  uint16_t* soft_row = room.take<uint16_t>(HALF ? TILE * lead : 0);
  uint16_t* slope_row = room.take<uint16_t>(HALF ? TILE * lead : 0);
  float* grad_q = room.take<float>(TILE * width);
  const float* weights = p.weights ? p.weights + (b * p.shared + head * p.shared / p.heads) * p.keys : nullptr;
  float weight[TILE];
  HeadFacts facts(p, b, head, heads, t);
  Rows q = of_heads<HALF>(p.q, b, head, heads, t, p.width, q_right);
  Rows o = of_heads<HALF>(p.grad_out, b, head, heads, t, p.value, o_right);
  turned<HALF>(q, 0, 0, 0, heads, p.width, lead, q_turned);
  turned<HALF>(o, 0, 0, 0, heads, p.value, lead, o_turned);
  if (HALF && grad_k) as_right<HALF>(q, 0, 0, 0, heads, p.width, q_right);
  if (HALF && grad_k) as_right<HALF>(o, 0, 0, 0, heads, p.value, o_right);
  if (count <= 0) __builtin_memset(grad_q, 0, TILE * width * 4);
  for (int64_t j = 0; j < count; j += TILE) {
    int64_t here = least(TILE, count - j);
    for (int64_t i = 0; weights && i < here; ++i) weight[i] = weights[number[j + i]] * LOG2E;
    Gathered k = gathered<HALF>(p.k, b, g, number + j, here, p.width, k_rows);
    Gathered v = gathered<HALF>(p.v, b, g, number + j, here, p.value, v_rows);
    Matrix a = as_left<HALF>(k.rows, b, g, k.first, here, p.width, left);
    Seen all{0, here, nullptr, nullptr, true};
    product<HALF, true>(here, lead, deep_k, a.data, a.lead, q_turned, lead,
                        Softmax<HALF, true>{softmax, lead, p.scale * LOG2E, weights ? weight : nullptr, facts.lse, all});
    a = as_left<HALF>(v.rows, b, g, v.first, here, p.value, left);
    product<HALF, true>(here, lead, deep_v, a.data, a.lead, o_turned, lead,
                        Slope<true>{softmax, slope, lead, facts.delta});
    if (HALF) narrowed(slope, here, lead, own ? pair : nullptr, grad_k ? slope_row : nullptr);
    if (own) {
      a = as_right<HALF>(k.rows, b, g, k.first, here, p.width, right);
      product<HALF, false>(heads, width, words<HALF>(here), HALF ? pair : (const Word*)slope, lead, a.data, a.lead,
                           Add{grad_q, width, j == 0});
    }
    if (!grad_k) continue;
    if (HALF) narrowed(softmax, here, lead, nullptr, soft_row);
    int64_t step = HALF ? lead / 2 : lead;
    product<HALF, true>(here, width, words<HALF>(heads), HALF ? (const Word*)slope_row : (const Word*)slope, step,
                        q_right, width, Give{grad_k, width, number + j});
    product<HALF, true>(here, value, words<HALF>(heads), HALF ? (const Word*)soft_row : (const Word*)softmax, step,
                        o_right, value, Give{grad_v, value, number + j});
    for (int64_t h = 0; p.grad_weights && h < heads; ++h)
      for (int64_t i = 0; i < here; ++i)
        p.grad_weights[(b * p.heads + head + h) * p.keys + number[j + i]] += slope[i * lead + h];
  }
  for (int64_t i = 0; own && i < heads; ++i)
    put<HALF>(grad_q + i * width, p.width, p.scale, (char*)at<HALF>(p.grad_q, b, head + i, t));
}

static void together(const Problem& p, int64_t b, int64_t head, int64_t heads, int64_t t, const int32_t* number,
                     int64_t count, float* to, int64_t stride, char* scratch) {
  p.half ? together_of<true>(p, b, head, heads, t, number, count, to, stride, scratch)
         : together_of<false>(p, b, head, heads, t, number, count, to, stride, scratch);
}
static void together_back(const Problem& p, int64_t b, int64_t head, int64_t heads, int64_t t, const int32_t* number,
                          int64_t count, bool own, float* grad_k, float* grad_v, char* scratch) {
  p.half ? together_back_of<true>(p, b, head, heads, t, number, count, own, grad_k, grad_v, scratch)
         : together_back_of<false>(p, b, head, heads, t, number, count, own, grad_k, grad_v, scratch);
}
static int64_t room_together(const Problem& p) {
  int64_t width = padded(p.width), value = padded(p.value), wide = width > value ? width : value;
  int64_t forward = TILE * (2 * width + 2 * value + wide + TILE / 2) + SPAN * TILE * TILE;
  int64_t backward = TILE * (5 * width + 3 * value + wide) + 4 * TILE * TILE;
  return (p.grad_out.data ? backward : forward) * 4 + 16 * 64;
}
