// Products of small matrices in registers, and what is done to them before they are stored.
//
//     C[M, N] = A[M, K] B[K, N]      A is read number by number and spread over a vector, B in vectors
//
// so that A may lie row by row or column by column, as it does in memory; only B must have its N neighbours together.
// In bf16 a "number" is the pair of neighbours along K in 32 bits, which is what the processor's instruction multiplies.
// Vectors are the compiler's own, and a register each: longer ones it would keep in memory between operations. Rows are
// padded to 16 numbers whatever the register.

typedef float Vector __attribute__((vector_size(REGISTER)));
typedef float Loose __attribute__((vector_size(REGISTER), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(REGISTER)));
typedef int32_t LooseInts __attribute__((vector_size(REGISTER), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(REGISTER)));
typedef uint32_t LooseBits __attribute__((vector_size(REGISTER), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(REGISTER / 2)));
typedef uint16_t LooseHalves __attribute__((vector_size(REGISTER / 2), aligned(2), may_alias));
typedef uint32_t Word __attribute__((may_alias));
#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))

constexpr int LANES = REGISTER / 4, WHOLE = 16;  // numbers of a vector, and those to which rows are padded
constexpr float LOG2E = 1.44269504088896340736f, LN2 = 0.69314718055994530942f;

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t padded(int64_t n) { return (n + WHOLE - 1) / WHOLE * WHOLE; }
INLINE Vector spread(float x) { return x - Vector{}; }  // -0 and NaN stay what they are
INLINE Vector load(const float* x) { return *(const Loose*)x; }
INLINE void store(float* x, Vector y) { *(Loose*)x = y; }
INLINE float number(Word x) {
  float y;
  __builtin_memcpy(&y, &x, 4);
  return y;
}
INLINE Ints lanes() {
  Ints x = {};
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) x[i] = i;
  return x;
}
INLINE Ints integers(int32_t x) { return x - Ints{}; }
#ifdef HAS_AVX512
typedef uint16_t ManyHalves __attribute__((vector_size(64)));
typedef uint16_t LooseManyHalves __attribute__((vector_size(64), aligned(2), may_alias));
constexpr ManyHalves ZIPPED = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                               8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
#endif
INLINE Vector choose(Ints which, Vector yes, Vector no) {
  return (Vector)(((Ints)yes & which) | ((Ints)no & ~which));
}

// 32-bit words that a row of numbers fills.
template <bool HALF>
INLINE int64_t words(int64_t width) {
  return HALF ? (width + 1) / 2 : width;
}

struct Scratch {  // memory handed out piece by piece, in whole cache lines
  char* next;
  template <class T>
  INLINE_MEMBER T* take(int64_t count) {
    T* x = (T*)next;
    next += (count * (int64_t)sizeof(T) + 63) / 64 * 64;
    return x;
  }
};

#ifdef HAS_AVX512
INLINE Vector fused(Vector a, Vector b, Vector c) { return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
// where one of the two is NaN the processor returns the second
INLINE Vector larger(Vector a, Vector b) { return (Vector)_mm512_max_ps((__m512)a, (__m512)b); }
#else
INLINE Vector fused(Vector a, Vector b, Vector c) { return a * b + c; }
#ifdef HAS_AVX2
INLINE Vector larger(Vector a, Vector b) { return (Vector)_mm256_max_ps((__m256)a, (__m256)b); }
#else
INLINE Vector larger(Vector a, Vector b) { return choose(a > b, a, b); }
#endif
#endif

// 2^x for x <= 0: 2^round(x) times a polynomial, least relative error on [-1/2, 1/2]: 7.5e-8, or 2.6e-6 where the result
// is rounded to bf16.
template <bool HALF>
INLINE Vector power_of_two(Vector x) {
  x = larger(spread(-200.0f), x);
#ifdef HAS_AVX512
  Vector whole = (Vector)_mm512_roundscale_ps((__m512)x, 0);
#else
  x = larger(spread(-126.0f), x);
  Vector whole = (x + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: what is added has no room for a fraction
#endif
  Vector part = x - whole, y;
  if (HALF) {
    y = fused(spread(0.009570102207362652f), part, spread(0.05591786280274391f));
    y = fused(y, part, spread(0.240247443318367f));
    y = fused(y, part, spread(0.6931217908859253f));
    y = fused(y, part, spread(0.9999992847442627f));
  } else {
    y = fused(spread(0.0013276472454890609f), part, spread(0.009675541892647743f));
    y = fused(y, part, spread(0.05550713092088699f));
    y = fused(y, part, spread(0.24022120237350464f));
    y = fused(y, part, spread(0.6931469440460205f));
    y = fused(y, part, spread(1.0000001192092896f));
  }
#ifdef HAS_AVX512
  return (Vector)_mm512_scalef_ps((__m512)y, (__m512)whole);
#else
  Ints exponent = __builtin_convertvector(whole, Ints);
  Vector scaled = (Vector)((Ints)y + (exponent << 23));
  return choose(whole < -125.0f, x - x, scaled);  // x - x: 0, and NaN for NaN
#endif
}

// Two rows of numbers as bf16, rounded to the nearest even, in the two halves of 32 bits: the first in the lower.
INLINE Bits rounded(Vector x) {
  Bits bits = (Bits)x, up = bits + 0x7fff + ((bits >> 16) & 1);
  Bits nan = (Bits)(x != x);
  return ((up & ~nan) | (0x7fc00000u & nan)) >> 16;
}
INLINE Bits pairs(Vector low, Vector high) {
#ifdef HAS_BF16
  return (Bits)__builtin_shuffle((ManyHalves)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low), ZIPPED);
#else
  return rounded(low) | (rounded(high) << 16);
#endif
}
// The same of two rows of bf16; a whole number of vectors.
INLINE void zip(const uint16_t* low, const uint16_t* high, int64_t columns, Word* to) {
  int64_t c = 0;
#ifdef HAS_AVX512
  for (; c + 2 * LANES <= columns; c += 2 * LANES) {
    ManyHalves a = *(const LooseManyHalves*)(low + c), b = *(const LooseManyHalves*)(high + c);
    *(LooseBits*)(to + c) = (Bits)__builtin_shuffle(a, b, ZIPPED + (ZIPPED & 16));
    *(LooseBits*)(to + c + LANES) = (Bits)__builtin_shuffle(a, b, ZIPPED + (ZIPPED & 16) + 16);
  }
#endif
  for (; c < columns; c += LANES) {
    Bits a = __builtin_convertvector(*(const LooseHalves*)(low + c), Bits);
    Bits b = __builtin_convertvector(*(const LooseHalves*)(high + c), Bits);
    *(LooseBits*)(to + c) = a | (b << 16);
  }
}
INLINE Halves halves(Vector x) {
#ifdef HAS_BF16
  return (Halves)_mm512_cvtneps_pbh((__m512)x);
#else
  return __builtin_convertvector(rounded(x), Halves);
#endif
}
INLINE Vector widened(Halves x) { return (Vector)(__builtin_convertvector(x, Bits) << 16); }

template <bool HALF>
INLINE Vector multiplied(Vector sum, Word a, Bits b) {
#ifdef HAS_BF16
  if (HALF) return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(a - Bits{}), (__m512bh)b);
#else
  static_assert(!HALF, "pairs are widened first");
#endif
  return fused(spread(number(a)), (Vector)b, sum);
}

// As many vectors of words as they have lanes turned, by halves, quarters and so on.
INLINE void turn(Bits (&x)[LANES]) {
  const Bits lane = (Bits)lanes();
#pragma GCC unroll 4
  for (uint32_t d = LANES / 2; d; d /= 2) {
    const Bits lower = (lane & d) == 0 ? lane : lane - d + LANES, upper = (lane & d) == 0 ? lane + d : lane + LANES;
#pragma GCC unroll 16
    for (uint32_t i = 0; i < LANES; ++i) {
      if (i & d) continue;
      Bits a = x[i], b = x[i + d];
      x[i] = __builtin_shuffle(a, b, lower);
      x[i + d] = __builtin_shuffle(a, b, upper);
    }
  }
}

// A whole vector, or without PAD as many of its numbers as there are.
template <bool PAD>
INLINE void store_some(Word* to, Bits x, int64_t there) {
  if (PAD || there >= LANES) {
    *(LooseBits*)to = x;
    return;
  }
#ifdef HAS_AVX512
  _mm512_mask_storeu_epi32(to, (__mmask16)((1u << most(0, there)) - 1), (__m512i)x);
#else
  for (int64_t i = 0; i < there; ++i) to[i] = x[i];
#endif
}

// Rows of words, `lead` apart, as columns; `columns` is whole vectors. PAD: zeros follow the rows up to a whole vector.
template <bool PAD = true>
static void turn_rows(const Word* from, int64_t lead, int64_t rows, int64_t columns, Word* to, int64_t lead_to) {
  for (int64_t r = 0; r < padded(rows); r += LANES)
    for (int64_t c = 0; c < columns; c += LANES) {
      Bits x[LANES];
#pragma GCC unroll 16
      for (int64_t i = 0; i < LANES; ++i) x[i] = r + i < rows ? *(const LooseBits*)(from + (r + i) * lead + c) : Bits{};
      turn(x);
#pragma GCC unroll 16
      for (int64_t i = 0; i < LANES; ++i) store_some<PAD>(to + (c + i) * lead_to + r, x[i], rows - r);
    }
}

// Add to what is there, or begin with zero.
struct Add {
  float* c;
  int64_t lead;
  bool fresh;
  INLINE_MEMBER Vector start(int64_t row, int64_t column) const {
    return fresh ? Vector{} : load(c + row * lead + column);
  }
  INLINE_MEMBER void end(int64_t row, int64_t column, Vector sum) const { store(c + row * lead + column, sum); }
};

#ifdef HAS_AMX
#include "matrices.h"
#else
template <bool HALF>
struct Matrices {
  Matrices() {}  // nothing to set up
};
#endif

constexpr int64_t STEPS_AHEAD = 24;

// One panel: M rows of N vectors of sums in registers over all of K. ROWS: A lies row by row, `lead` apart; else column
// by column. What comes from memory is asked for on the way: of A the rows of the next panel, of B the lines some steps
// ahead, which are kept for later panels where there is `room`.
enum class Far { none, a, b };
template <int M, int N, bool HALF, bool ROWS, Far FAR, class Finish>
INLINE void panel(const Word* a, int64_t lead, const Word* b, int64_t lead_b, int64_t count, const Finish& finish,
                  int64_t row, int64_t column, Word* room = nullptr) {
  Vector sum[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sum[m][n] = finish.start(row + m, column + LANES * n);
  for (int64_t k = 0; k < count; ++k) {
    if (FAR == Far::a && k % WHOLE == 0)
#pragma GCC unroll 8
      for (int m = M; m < 2 * M; ++m) __builtin_prefetch(a + m * lead + k, 0, 2);
    if (FAR == Far::b)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) __builtin_prefetch(b + (k + STEPS_AHEAD) * lead_b + LANES * n, 0, 2);
    Bits line[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) line[n] = *(const LooseBits*)(b + k * lead_b + LANES * n);
    if (FAR == Far::b && room)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) *(LooseBits*)(room + (k * N + n) * LANES) = line[n];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      Word one = ROWS ? a[m * lead + k] : a[k * lead + m];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sum[m][n] = multiplied<HALF>(sum[m][n], one, line[n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) finish.end(row + m, column + LANES * n, sum[m][n]);
}

template <int N, bool HALF, bool ROWS, Far FAR, class Finish>
static void strip(int64_t rows, const Word* a, int64_t lead, const Word* b, int64_t lead_b, int64_t count,
                  const Finish& finish, int64_t column, Word* room) {
  constexpr Far LATER = FAR == Far::b ? Far::none : FAR;  // the first panel has B come
  int64_t row = 0, step = ROWS ? lead : 1;
  if (FAR == Far::b && rows >= PANEL) {
    if (rows == PANEL) room = nullptr;
    panel<PANEL, N, HALF, ROWS, FAR>(a, lead, b, lead_b, count, finish, 0, column, room);
    row = PANEL;
    if (room) b = room, lead_b = N * LANES;
  }
  for (; row + PANEL <= rows; row += PANEL)
    panel<PANEL, N, HALF, ROWS, LATER>(a + row * step, lead, b, lead_b, count, finish, row, column);
  for (; row + 2 <= rows; row += 2)
    panel<2, N, HALF, ROWS, LATER>(a + row * step, lead, b, lead_b, count, finish, row, column);
  if (row < rows) panel<1, N, HALF, ROWS, LATER>(a + row * step, lead, b, lead_b, count, finish, row, column);
}

template <bool HALF, bool ROWS, Far FAR, class Finish>
INLINE void product_in_strips(int64_t rows, int64_t columns, int64_t count, const Word* a, int64_t lead, const Word* b,
                              int64_t lead_b, const Finish& finish, Word* room = nullptr) {
  int64_t column = 0;
  for (; column + WIDE * LANES <= columns; column += WIDE * LANES)
    strip<WIDE, HALF, ROWS, FAR>(rows, a, lead, b + column, lead_b, count, finish, column, room);
  if (WIDE > 2)
    for (; column + 2 * LANES <= columns; column += 2 * LANES)
      strip<WIDE < 2 ? WIDE : 2, HALF, ROWS, FAR>(rows, a, lead, b + column, lead_b, count, finish, column, room);
  for (; column < columns; column += LANES)
    strip<1, HALF, ROWS, FAR>(rows, a, lead, b + column, lead_b, count, finish, column, room);
}

#ifndef HAS_BF16
#include "widened.h"
#endif

// `columns` is a multiple of 16, and a Matrices<HALF> is alive. `room`: count x WIDE vectors, where
// a B that is Far is kept; without it every panel reads B as it lies.
template <bool HALF, bool ROWS, Far FAR = Far::none, class Finish>
INLINE void product(int64_t rows, int64_t columns, int64_t count, const Word* a, int64_t lead, const Word* b,
                    int64_t lead_b, const Finish& finish, Word* room = nullptr) {
#ifdef HAS_AMX
  if (HALF && (ROWS || count <= SHORT))
    return product_in_squares<ROWS>(rows, columns, count, a, lead, b, lead_b, finish);
#endif
#ifdef HAS_BF16
  constexpr bool WIDENED = false;
#else
  constexpr bool WIDENED = HALF;
#endif
  if constexpr (WIDENED)
    product_widened<ROWS>(rows, columns, count, a, lead, b, lead_b, finish);
  else
    product_in_strips<HALF, ROWS, FAR>(rows, columns, count, a, lead, b, lead_b, finish, room);
}
