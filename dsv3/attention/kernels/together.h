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

static void together(const Problem& p, int64_t b, int64_t head, int64_t heads, int64_t t, const int32_t* number,
                     int64_t count, float* to, int64_t stride, char* scratch) {
  p.half ? together_of<true>(p, b, head, heads, t, number, count, to, stride, scratch)
         : together_of<false>(p, b, head, heads, t, number, count, to, stride, scratch);
}
static int64_t room_together(const Problem& p) {
  int64_t width = padded(p.width), value = padded(p.value), wide = width > value ? width : value;
  return (TILE * (2 * width + 2 * value + wide + TILE / 2) + SPAN * TILE * TILE) * 4 + 8 * 64;
}
