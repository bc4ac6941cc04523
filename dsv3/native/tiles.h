// Products of small matrices in registers, and what is done to them before they are stored.
//
//     C[M, N] = A[M, K] B[K, N]      A is read number by number and spread over a vector, B in vectors of 16
//
// so that A may lie row by row or column by column, as it does in memory; only B must have its N neighbours together.
// In bf16 a "number" is the pair of neighbours along K in 32 bits, which is what the processor's instruction multiplies.
// Vectors are the compiler's own: it turns 16 floats into one, two or four registers of the processor at hand. Where it
// takes several it keeps them in memory between operations, so the sums of a product are vectors of a register each.

typedef float Vector __attribute__((vector_size(64)));
typedef float Loose __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef int32_t LooseInts __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef uint32_t LooseBits __attribute__((vector_size(64), aligned(4), may_alias));
typedef float Part __attribute__((vector_size(REGISTER), may_alias));
typedef float LoosePart __attribute__((vector_size(REGISTER), aligned(4), may_alias));
typedef uint32_t PartBits __attribute__((vector_size(REGISTER)));
typedef uint32_t LoosePartBits __attribute__((vector_size(REGISTER), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint16_t LooseHalves __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint16_t ManyHalves __attribute__((vector_size(64)));
typedef uint16_t LooseManyHalves __attribute__((vector_size(64), aligned(2), may_alias));
typedef uint32_t Word __attribute__((may_alias));
#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))

constexpr int LANES = 16, PARTS = 64 / REGISTER;
constexpr float LOG2E = 1.44269504088896340736f, LN2 = 0.69314718055994530942f;

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }
INLINE Vector spread(float x) { return x - Vector{}; }  // -0 and NaN stay what they are
INLINE Vector load(const float* x) { return *(const Loose*)x; }
INLINE void store(float* x, Vector y) {
#pragma GCC unroll 4
  for (int i = 0; i < PARTS; ++i) *(LoosePart*)(x + LANES / PARTS * i) = ((const Part*)&y)[i];
}
INLINE float number(Word x) {
  float y;
  __builtin_memcpy(&y, &x, 4);
  return y;
}
INLINE Ints lanes() { return Ints{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }
INLINE Ints integers(int32_t x) { return x - Ints{}; }
constexpr ManyHalves ZIPPED = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
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
INLINE Vector larger(Vector a, Vector b) { return choose(a > b, a, b); }
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
INLINE Part multiplied(Part sum, Word a, PartBits b) {
#ifdef HAS_AVX512
  if (!HALF) return (Part)fused(spread(number(a)), (Vector)b, (Vector)sum);
#else
  if (!HALF) return number(a) * (Part)b + sum;
#endif
#ifdef HAS_BF16
  Bits both = a - Bits{};
  return (Part)_mm512_dpbf16_ps((__m512)sum, (__m512bh)both, (__m512bh)b);
#else
  sum = multiplied<false>(sum, a & 0xffff0000u, b & 0xffff0000u);
  return multiplied<false>(sum, a << 16, b << 16);
#endif
}

// 16 x 16 words turned, by halves, quarters, eighths and sixteenths.
INLINE void turn(Bits (&x)[LANES]) {
#ifdef HAS_AVX512
  const Bits lane = (Bits)lanes();
#pragma GCC unroll 4
  for (uint32_t d = LANES / 2; d; d /= 2) {
    const Bits lower = (lane & d) == 0 ? lane : lane - d + 16, upper = (lane & d) == 0 ? lane + d : lane + 16;
#pragma GCC unroll 16
    for (uint32_t i = 0; i < LANES; ++i) {
      if (i & d) continue;
      Bits a = x[i], b = x[i + d];
      x[i] = __builtin_shuffle(a, b, lower);
      x[i + d] = __builtin_shuffle(a, b, upper);
    }
  }
#else
  for (int i = 0; i < LANES; ++i)
    for (int j = 0; j < i; ++j) {
      uint32_t one = x[i][j];
      x[i][j] = x[j][i];
      x[j][i] = one;
    }
#endif
}

// Rows of words, `lead` apart, as columns; `columns` is whole vectors, and rows up to whole vectors are zeros.
static void turn_rows(const Word* from, int64_t lead, int64_t rows, int64_t columns, Word* to, int64_t lead_to) {
  for (int64_t r = 0; r < rows; r += LANES)
    for (int64_t c = 0; c < columns; c += LANES) {
      Bits x[LANES];
#pragma GCC unroll 16
      for (int64_t i = 0; i < LANES; ++i) x[i] = r + i < rows ? *(const LooseBits*)(from + (r + i) * lead + c) : Bits{};
      turn(x);
#pragma GCC unroll 16
      for (int64_t i = 0; i < LANES; ++i) *(LooseBits*)(to + (c + i) * lead_to + r) = x[i];
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

// One panel: M x (16 N) sums in registers over all of K. ROWS: A lies row by row, `lead` apart; else column by column.
// What comes from memory is asked for on the way: of A the rows of the next panel, of B the lines some steps ahead.
enum class Far { none, a, b };
template <int M, int N, bool HALF, bool ROWS, Far FAR, class Finish>
INLINE void panel(const Word* a, int64_t lead, const Word* b, int64_t lead_b, int64_t count, const Finish& finish,
                  int64_t row, int64_t column) {
  Part sum[M][N * PARTS];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      Vector start = finish.start(row + m, column + LANES * n);
#pragma GCC unroll 4
      for (int part = 0; part < PARTS; ++part) sum[m][n * PARTS + part] = ((const Part*)&start)[part];
    }
  for (int64_t k = 0; k < count; ++k) {
    if (FAR == Far::a && k % LANES == 0)
#pragma GCC unroll 8
      for (int m = M; m < 2 * M; ++m) __builtin_prefetch(a + m * lead + k, 0, 2);
    if (FAR == Far::b)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) __builtin_prefetch(b + (k + STEPS_AHEAD) * lead_b + LANES * n, 0, 2);
    PartBits line[N * PARTS];
#pragma GCC unroll 8
    for (int n = 0; n < N * PARTS; ++n) line[n] = *(const LoosePartBits*)(b + k * lead_b + LANES / PARTS * n);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      Word one = ROWS ? a[m * lead + k] : a[k * lead + m];
#pragma GCC unroll 8
      for (int n = 0; n < N * PARTS; ++n) sum[m][n] = multiplied<HALF>(sum[m][n], one, line[n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      Vector end;
#pragma GCC unroll 4
      for (int part = 0; part < PARTS; ++part) ((Part*)&end)[part] = sum[m][n * PARTS + part];
      finish.end(row + m, column + LANES * n, end);
    }
}

template <int N, bool HALF, bool ROWS, Far FAR, class Finish>
static void strip(int64_t rows, const Word* a, int64_t lead, const Word* b, int64_t lead_b, int64_t count,
                  const Finish& finish, int64_t column) {
  constexpr Far LATER = FAR == Far::b ? Far::none : FAR;  // the first panel has B come
  int64_t row = 0, step = ROWS ? lead : 1;
  if (FAR == Far::b && rows >= PANEL) {
    panel<PANEL, N, HALF, ROWS, FAR>(a, lead, b, lead_b, count, finish, 0, column);
    row = PANEL;
  }
  for (; row + PANEL <= rows; row += PANEL)
    panel<PANEL, N, HALF, ROWS, LATER>(a + row * step, lead, b, lead_b, count, finish, row, column);
  for (; row + 2 <= rows; row += 2)
    panel<2, N, HALF, ROWS, LATER>(a + row * step, lead, b, lead_b, count, finish, row, column);
  if (row < rows) panel<1, N, HALF, ROWS, LATER>(a + row * step, lead, b, lead_b, count, finish, row, column);
}

// `columns` is a multiple of 16, and a Matrices<HALF> is alive.
template <bool HALF, bool ROWS, Far FAR = Far::none, class Finish>
INLINE void product(int64_t rows, int64_t columns, int64_t count, const Word* a, int64_t lead, const Word* b,
                    int64_t lead_b, const Finish& finish) {
#ifdef HAS_AMX
  if (HALF && (ROWS || count <= SHORT))
    return product_in_squares<ROWS>(rows, columns, count, a, lead, b, lead_b, finish);
#endif
  int64_t column = 0;
  for (; column + WIDE * LANES <= columns; column += WIDE * LANES)
    strip<WIDE, HALF, ROWS, FAR>(rows, a, lead, b + column, lead_b, count, finish, column);
  if (WIDE > 2)
    for (; column + 2 * LANES <= columns; column += 2 * LANES)
      strip<WIDE < 2 ? WIDE : 2, HALF, ROWS, FAR>(rows, a, lead, b + column, lead_b, count, finish, column);
  for (; column < columns; column += LANES)
    strip<1, HALF, ROWS, FAR>(rows, a, lead, b + column, lead_b, count, finish, column);
}
