// Passes of a layer of SwiGLU experts over rows sorted by expert.
//
//     hidden     h = x W_gate_up;   a = w silu(h_gate) h_up            expert by expert
//     out        y[token] += a W_down                                  columns apart, experts in order
//     weights    g = dy[token] W_down^T;   dw = <g, a / w>;   dh = w g (h_up silu'(h_gate), silu(h_gate))
//                dW_down = a^T dy[token];   dW_gate_up = x[token]^T dh
//     inputs     dx[token] += dh W_gate_up^T
//
// Weights are read as they lie wherever a product allows: with inputs before outputs they are factor B of the forward
// products, and row by row factor A of the backward ones, whose B is the few rows of an expert, turned. bf16's forward
// pass has to copy them, in pairs of rows, and without instructions for bf16 every product of more than a few rows;
// fp32's copies a strip while it is read first. So few rows an expert cost little more each than many.

constexpr int64_t STRIP = 64;    // columns of B that are copied at a time: the widest panel; 1024 of fp32 are 256 KiB
constexpr int64_t FEW_ROWS = 6;  // one panel takes so many with any instructions but portable ones: B is read once
constexpr int64_t TILE = 64;     // rows that a backward product has in its lanes
constexpr int64_t ROWS_AHEAD = 16, SUMS_AHEAD = 4;
constexpr int64_t CACHED = 1 << 23;  // bytes of gradients that caches may still hold when an optimizer asks for them

template <bool HALF>
constexpr int64_t size_of() {
  return HALF ? 2 : 4;
}
template <bool HALF>
INLINE Vector read(const char* x, int64_t i) {
  return HALF ? widened(*(const LooseHalves*)(x + i * 2)) : load((const float*)x + i);
}
template <bool HALF>
INLINE void write(char* x, int64_t i, Vector y) {
  if (HALF)
    *(LooseHalves*)(x + i * 2) = halves(y);
  else
    store((float*)x + i, y);
}

// ---- where products end

template <bool HALF>
struct Put {
  char* to;
  int64_t lead;
  INLINE_MEMBER Vector start(int64_t, int64_t) const { return Vector{}; }
  INLINE_MEMBER void end(int64_t row, int64_t column, Vector sum) const { write<HALF>(to, row * lead + column, sum); }
};

template <bool HALF>
struct PutAway {  // past the caches where they cannot hold it: what is written is read when much else has been
  char* to;
  int64_t lead;
  bool past;
  INLINE_MEMBER Vector start(int64_t, int64_t) const { return Vector{}; }
  INLINE_MEMBER void end(int64_t row, int64_t column, Vector sum) const {
#ifdef HAS_AVX512
    if (past && HALF) return _mm256_stream_si256((__m256i*)(to + (row * lead + column) * 2), (__m256i)halves(sum));
    if (past) return _mm512_stream_ps((float*)to + row * lead + column, (__m512)sum);
#endif
    write<HALF>(to, row * lead + column, sum);
  }
};

struct Scatter {  // each row is added to that of its token, which is asked for before the product
  float* to;
  int64_t lead;
  const int64_t* token;
  INLINE_MEMBER Vector start(int64_t row, int64_t column) const {
    __builtin_prefetch(to + token[row] * lead + column, 1, 3);
    return Vector{};
  }
  INLINE_MEMBER void end(int64_t row, int64_t column, Vector sum) const {
    float* y = to + token[row] * lead + column;
    store(y, load(y) + sum);
  }
};

// ---- what is copied for them

static void gather(const char* x, int64_t bytes, const int64_t* token, int64_t count, char* to) {
  constexpr int64_t AHEAD = 8;
  for (int64_t i = 0; i < count; ++i) {
    const char* later = x + token[least(i + AHEAD, count - 1)] * bytes;
    for (int64_t c = 0; c < bytes; c += 64) __builtin_prefetch(later + c, 0, 2);
    __builtin_memcpy(to + i * bytes, x + token[i] * bytes, bytes);
  }
}

// bf16 rows, `lead` apart, in pairs: each word has neighbours of a column; an odd row is paired with zeros.
static void paired(const char* x, int64_t rows, int64_t columns, int64_t lead, Word* to) {
  const uint16_t* low = (const uint16_t*)x;
  for (int64_t i = 0; i < rows; i += 2, low += 2 * lead, to += columns) {
    const uint16_t* high = low + lead;
    for (int64_t c = 0; c < columns; c += 2 * WHOLE) {  // a line of the cache
      __builtin_prefetch(low + ROWS_AHEAD * lead + c, 0, 2);
      __builtin_prefetch(high + ROWS_AHEAD * lead + c, 0, 2);
    }
    if (i + 1 < rows)
      zip(low, high, columns, to);
    else
      for (int64_t c = 0; c < columns; ++c) to[c] = low[c];
  }
}

// In fp32 the first panel of a product keeps what it reads of B. Its rows often lie a power of two apart: each step
// of every panel would touch another page and the same few sets of the cache.
template <bool HALF>
constexpr Far FROM_MEMORY = HALF ? Far::none : Far::b;

struct Factor {
  const Word* data;
  int64_t lead;
};
template <bool HALF>
INLINE Factor as_right(const char* x, int64_t rows, int64_t columns, int64_t lead, Word* room) {
  if (!HALF) return {(const Word*)x, lead};
  paired(x, rows, columns, lead, room);
  return {room, columns};
}

#ifdef HAS_AMX
constexpr bool LEFT_IN_ROWS = true;   // factor A of a product over rows of bf16: registers of matrices want it turned
#else
constexpr bool LEFT_IN_ROWS = false;  // in fp32 it is turned everywhere, so that it too comes from few pages
#endif

// Rows of bf16 in pairs as factor A, which begins with rows before the `first`; `lead` words apart.
static void paired_left(const char* x, int64_t rows, int64_t columns, int64_t first, Word* to, int64_t lead,
                        Word* room) {
  if (!LEFT_IN_ROWS) return paired(x, rows, columns, columns, to + first / 2 * lead);
  paired(x, rows, columns, columns, room);
  turn_rows(room, columns, words<true>(rows), columns, to + first / 2, lead);
}

// ---- SwiGLU

INLINE Vector sigmoid(Vector x) {
  Vector e = power_of_two<false>(choose(x < 0.0f, x, -x) * LOG2E);  // e^-|x|
  return choose(x < 0.0f, e, spread(1.0f)) / (e + 1.0f);
}

template <bool HALF>
static void activate(const char* h, int64_t inner, float weight, char* a) {
  for (int64_t c = 0; c < inner; c += LANES) {
    Vector gate = read<HALF>(h, c), up = read<HALF>(h, inner + c);
    write<HALF>(a, c, gate * sigmoid(gate) * up * weight);
  }
}

// From g, the gradient of silu(gate) up: dh, the weighted activation, and the gradient of the weight.
template <bool HALF>
static float backward_row(const float* g, const char* h, int64_t inner, float weight, char* dh, char* a) {
  Vector sums = {};
  float sum = 0.0f;
  for (int64_t c = 0; c < inner; c += LANES) {
    Vector gate = read<HALF>(h, c), up = read<HALF>(h, inner + c), pull = load(g + c);
    Vector s = sigmoid(gate), silu = gate * s, active = silu * up;
    sums = fused(pull, active, sums);
    write<HALF>(a, c, active * weight);
    pull = pull * weight;
    write<HALF>(dh, c, pull * up * (s + silu * (1.0f - s)));
    write<HALF>(dh, inner + c, pull * silu);
  }
  for (int n = 0; n < LANES; ++n) sum += sums[n];
  return sum;
}

// ---- scratch memory: what a pass takes of it, `next` being where that ends

// For factor B of a product that is `deep` words long: bf16 always copies it, fp32 keeps it for more than FEW_ROWS.
template <bool HALF>
INLINE Word* strip_of(Scratch& scratch, const Problem& p, int64_t deep) {
  return HALF || p.longest > FEW_ROWS ? scratch.take<Word>(deep * STRIP) : nullptr;
}

template <bool HALF>
struct HiddenRoom : Scratch {
  Word *rows, *strip;
  HiddenRoom(const Problem& p, char* scratch) : Scratch{scratch} {
    int64_t deep = words<HALF>(p.hidden);
    rows = take<Word>(p.longest * deep);
    strip = strip_of<HALF>(*this, p, deep);
  }
};

template <bool HALF>
struct OutRoom : Scratch {
  Word* strip;
  OutRoom(const Problem& p, char* scratch) : Scratch{scratch} {
    strip = strip_of<HALF>(*this, p, words<HALF>(p.inner));
  }
};

// What is not needed at the same time lies in the same place: dy and a, factors of one product, and then x and dh, of
// the next (fp32's dh lies in place); of a tile, dy as it comes, g turned and what is to be paired; dy turned, g, what
// is to be turned, and the strip that a product keeps.
template <bool HALF>
struct WeightsRoom : Scratch {
  static constexpr bool IN_ROWS = !HALF || LEFT_IN_ROWS;
  int64_t all;  // rows of an expert, or pairs of them
  Word *of_hidden, *of_inner, *rows, *turned;
  WeightsRoom(const Problem& p, char* scratch) : Scratch{scratch} {
    int64_t d = p.hidden, f = p.inner, tile = least(TILE, padded(p.longest));
    all = HALF && LEFT_IN_ROWS ? padded(words<HALF>(p.longest)) : words<HALF>(p.longest);
    of_hidden = take<Word>(all * d);
    of_inner = take<Word>(all * (HALF ? 2 * f : f));
    rows = take<Word>(tile * (HALF ? most(words<HALF>(d), f) : f));
    // Rows are turned a whole vector at a time; in fp32 a product keeps its strip here when they are.
    turned = take<Word>(most(tile * most(padded(words<HALF>(d)), f), HALF ? 0 : p.longest * STRIP));
  }
};

template <bool HALF>
struct InputsRoom : Scratch {
  Word* turned;  // dh, then the dx that comes of it
  float* turned_dx;
  InputsRoom(const Problem& p, int64_t columns, char* scratch) : Scratch{scratch} {
    int64_t tile = least(TILE, padded(p.longest));
    turned = take<Word>(tile * most(words<HALF>(2 * p.inner), columns));
    turned_dx = take<float>(tile * columns);
  }
};

// Laid out from address 0, memory ends after as many bytes as it needs.
template <bool HALF>
static Rooms rooms_of(const Problem& p, int64_t columns) {
  return {(int64_t)HiddenRoom<HALF>(p, nullptr).next, (int64_t)OutRoom<HALF>(p, nullptr).next,
          (int64_t)WeightsRoom<HALF>(p, nullptr).next, (int64_t)InputsRoom<HALF>(p, columns, nullptr).next};
}
static Rooms rooms(const Problem& p, int64_t columns) {
  return p.half ? rooms_of<true>(p, columns) : rooms_of<false>(p, columns);
}

// ---- passes

template <bool HALF>
static void hidden_of(const Problem& p, int64_t e, char* scratch) {
  Matrices<HALF> registers;
  HiddenRoom<HALF> room(p, scratch);
  constexpr int64_t size = size_of<HALF>();
  int64_t first = p.start[e], stop = p.start[e + 1], d = p.hidden, f = p.inner, deep = words<HALF>(d);
  if (first == stop) return;
  gather(p.x, d * size, p.token + first, stop - first, (char*)room.rows);
  for (int64_t c = 0; c < 2 * f; c += STRIP) {
    Factor weights =
        as_right<HALF>(p.gate_up + (e * d * 2 * f + c) * size, d, least(STRIP, 2 * f - c), 2 * f, room.strip);
    product<HALF, true, FROM_MEMORY<HALF>>(stop - first, least(STRIP, 2 * f - c), deep, room.rows, deep, weights.data,
                                           weights.lead, Put<HALF>{p.h + (first * 2 * f + c) * size, 2 * f},
                                           room.strip);
  }
  for (int64_t i = first; i < stop; ++i)
    activate<HALF>(p.h + i * 2 * f * size, f, p.weight[i], p.a + i * f * size);
}

template <bool HALF>
static void out_of(const Problem& p, int64_t column, int64_t columns, char* scratch) {
  Matrices<HALF> registers;
  OutRoom<HALF> room(p, scratch);
  constexpr int64_t size = size_of<HALF>();
  int64_t d = p.hidden, f = p.inner, deep = words<HALF>(f);
  for (int64_t e = 0; e < p.experts; ++e) {
    int64_t first = p.start[e], stop = p.start[e + 1];
    if (first == stop) continue;
    for (int64_t c = column; c < column + columns; c += STRIP) {
      int64_t wide = least(STRIP, column + columns - c);
      Factor weights = as_right<HALF>(p.down + (e * f * d + c) * size, f, wide, d, room.strip);
      product<HALF, true, FROM_MEMORY<HALF>>(stop - first, wide, deep, (const Word*)(p.a + first * f * size), deep,
                                             weights.data, weights.lead, Scatter{p.y + c, d, p.token + first},
                                             room.strip);
    }
  }
}

// dweight, dh and ddown of an expert.
template <bool HALF>
static void down_of(const Problem& p, int64_t e, const WeightsRoom<HALF>& room, bool past) {
  constexpr int64_t size = size_of<HALF>();
  constexpr bool IN_ROWS = WeightsRoom<HALF>::IN_ROWS;
  int64_t first = p.start[e], count = p.start[e + 1] - first, d = p.hidden, f = p.inner, deep = words<HALF>(d);
  int64_t lead_a = IN_ROWS ? room.all : f;
  Word *dy = room.of_hidden, *a = room.of_inner, *g = room.turned;
  const Word* down = (const Word*)(p.down + e * f * d * size);
  for (int64_t i = 0; i < count; i += TILE) {
    int64_t n = least(TILE, count - i), lead = padded(n), row = first + i;
    Word* own_dy = HALF ? room.rows : dy + i * d;
    gather(p.dy, d * size, p.token + row, n, (char*)own_dy);
    if (HALF) paired((char*)own_dy, n, d, d, dy + i / 2 * d);
    turn_rows(own_dy, deep, n, deep, room.turned, lead);
    product<HALF, true, Far::a>(f, lead, deep, down, deep, room.turned, lead, Put<false>{(char*)room.rows, lead});
    turn_rows(room.rows, lead, f, lead, g, f);
    char* own_a = (char*)room.rows;
    for (int64_t j = 0; j < n; ++j)
      p.dweight[row + j] = backward_row<HALF>((const float*)g + j * f, p.h + (row + j) * 2 * f * size, f,
                                              p.weight[row + j], p.dh + (row + j) * 2 * f * size, own_a + j * f * size);
    if (HALF)
      paired_left(own_a, n, f, i, a, lead_a, room.turned);
    else
      turn_rows<false>((Word*)own_a, f, n, f, a + i, lead_a);
  }
  product<HALF, IN_ROWS, FROM_MEMORY<HALF>>(f, d, words<HALF>(count), a, lead_a, dy, d,
                                            PutAway<HALF>{p.ddown + e * f * d * size, d, past}, room.turned);
}

// dgate_up of an expert whose dh is there.
template <bool HALF>
static void gate_up_of(const Problem& p, int64_t e, const WeightsRoom<HALF>& room, bool past) {
  constexpr int64_t size = size_of<HALF>();
  constexpr bool IN_ROWS = WeightsRoom<HALF>::IN_ROWS;
  int64_t first = p.start[e], count = p.start[e + 1] - first, d = p.hidden, f = p.inner;
  int64_t lead_x = IN_ROWS ? room.all : d;
  Word* x = room.of_hidden;
  const char* dh = p.dh + first * 2 * f * size;
  for (int64_t i = 0; i < count; i += TILE) {
    int64_t n = least(TILE, count - i);
    char* own_x = (char*)(HALF ? room.rows : room.turned);
    gather(p.x, d * size, p.token + first + i, n, own_x);
    if (HALF)
      paired_left(own_x, n, d, i, x, lead_x, room.turned);
    else
      turn_rows<false>((Word*)own_x, d, n, d, x + i, lead_x);
  }
  if (HALF) paired(dh, count, 2 * f, 2 * f, room.of_inner);
  const Word* right = HALF ? room.of_inner : (const Word*)dh;
  product<HALF, IN_ROWS, FROM_MEMORY<HALF>>(d, 2 * f, words<HALF>(count), x, lead_x, right, 2 * f,
                                            PutAway<HALF>{p.dgate_up + e * d * 2 * f * size, 2 * f, past}, room.turned);
}

template <bool HALF>
static void weights_of(const Problem& p, int64_t e, char* scratch) {
  Matrices<HALF> registers;
  WeightsRoom<HALF> room(p, scratch);
  bool past = p.experts * 3 * p.inner * p.hidden * size_of<HALF>() > CACHED;
  down_of<HALF>(p, e, room, past);
  gate_up_of<HALF>(p, e, room, past);
#ifdef HAS_AVX512
  _mm_sfence();
#endif
}

template <bool HALF>
static void inputs_of(const Problem& p, int64_t column, int64_t columns, char* scratch) {
  Matrices<HALF> registers;
  InputsRoom<HALF> room(p, columns, scratch);
  int64_t d = p.hidden, f = p.inner, deep = words<HALF>(2 * f);
  float* dx = (float*)room.turned;
  for (int64_t e = 0; e < p.experts; ++e) {
    const Word* weights = (const Word*)(p.gate_up + (e * d + column) * 2 * f * size_of<HALF>());
    for (int64_t first = p.start[e]; first < p.start[e + 1]; first += TILE) {
      int64_t n = least(TILE, p.start[e + 1] - first), lead = padded(n);
      turn_rows((const Word*)(p.dh + first * 2 * f * size_of<HALF>()), deep, n, deep, room.turned, lead);
      product<HALF, true, Far::a>(columns, lead, deep, weights, deep, room.turned, lead,
                                  Put<false>{(char*)room.turned_dx, lead});
      turn_rows((const Word*)room.turned_dx, lead, columns, lead, (Word*)dx, columns);
      for (int64_t i = 0; i < n; ++i) {
        float* to = p.dx + p.token[first + i] * d + column;
        float* later = p.dx + p.token[first + least(i + SUMS_AHEAD, n - 1)] * d + column;
        for (int64_t c = 0; c < columns; c += LANES) {
          __builtin_prefetch(later + c, 1, 3);
          store(to + c, load(to + c) + load(dx + i * columns + c));
        }
      }
    }
  }
}

static void hidden(const Problem& p, int64_t e, char* scratch) {
  p.half ? hidden_of<true>(p, e, scratch) : hidden_of<false>(p, e, scratch);
}
static void out(const Problem& p, int64_t column, int64_t columns, char* scratch) {
  p.half ? out_of<true>(p, column, columns, scratch) : out_of<false>(p, column, columns, scratch);
}
static void weights(const Problem& p, int64_t e, char* scratch) {
  p.half ? weights_of<true>(p, e, scratch) : weights_of<false>(p, e, scratch);
}
static void inputs(const Problem& p, int64_t column, int64_t columns, char* scratch) {
  p.half ? inputs_of<true>(p, column, columns, scratch) : inputs_of<false>(p, column, columns, scratch);
}
