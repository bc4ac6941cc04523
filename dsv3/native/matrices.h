// Products in the processor's own registers of matrices (AMX): 16 x 16 sums of 16 pairs of bf16 in one instruction.
//
// Both factors lie as `product` takes them, so most are loaded as they are: A in rows of pairs, B in lines of columns. A
// that lies column by column is turned first; what ends before the register does goes through memory with zeros behind.
// A sum begins with zero and is added to what `finish` starts with, so it does not depend on how sums are cut.

constexpr int64_t SIDE = 16;    // rows of a register, and pairs or sums of a row
constexpr int64_t DEEP = 1024;  // pairs of a factor that are turned once for all columns: 128 KiB of the stack

struct alignas(64) Square {
  Word data[SIDE * SIDE];
};

// All eight registers have 16 rows of 64 bytes, from here to the end of the block of code.
template <bool HALF>
struct Matrices {
  Matrices() {
    if (!HALF) return;
    struct alignas(64) {
      uint8_t palette = 1, unused[15] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shapes;
    asm volatile("ldtilecfg %0" ::"m"(shapes));
  }
  ~Matrices() {
    if (HALF) asm volatile("tilerelease");
  }
};

template <int TO>
INLINE void clear() {
  asm volatile("tilezero %%tmm%c0" ::"i"(TO));
}
template <int TO>
INLINE void fill(const Word* from, int64_t lead) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(TO), "r"(from), "r"(lead * 4) : "memory");
}
template <int FROM>
INLINE void empty(float* to, int64_t lead) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(FROM), "r"(to), "r"(lead * 4) : "memory");
}
template <int SUM, int A, int B>
INLINE void add_product() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(A), "i"(B));
}

// Up to 16 rows of up to 16 words, and zeros.
template <int TO>
INLINE void fill_part(const Word* from, int64_t lead, int64_t rows, int64_t columns) {
  Square part;
  __mmask16 there = (__mmask16)((1u << columns) - 1);
  for (int64_t i = 0; i < SIDE; ++i)
    _mm512_store_si512(part.data + i * SIDE,
                       i < rows ? _mm512_maskz_loadu_epi32(there, from + i * lead) : _mm512_setzero_si512());
  fill<TO>(part.data, SIDE);
}

// 16 columns of A as rows; of its lines, which are `lead` apart, up to 16 are there.
INLINE void turn_lines(const Word* from, int64_t lead, int64_t count, Word* to, int64_t lead_to) {
  Bits x[SIDE];
#pragma GCC unroll 16
  for (int64_t i = 0; i < SIDE; ++i) x[i] = i < count ? *(const LooseBits*)(from + i * lead) : Bits{};
  turn(x);
#pragma GCC unroll 16
  for (int64_t i = 0; i < SIDE; ++i) *(LooseBits*)(to + i * lead_to) = x[i];
}

template <int TO, bool ROWS>
INLINE void fill_left(const Word* a, int64_t lead, int64_t rows, int64_t k, int64_t count) {
  if (ROWS && rows >= SIDE && count - k >= SIDE) return fill<TO>(a + k, lead);
  if (ROWS) return fill_part<TO>(a + k, lead, least(rows, SIDE), least(count - k, SIDE));
  Square part;
  turn_lines(a + k * lead, lead, count - k, part.data, SIDE);
  fill<TO>(part.data, SIDE);
}
template <int TO>
INLINE void fill_right(const Word* b, int64_t lead, int64_t k, int64_t count) {
  if (count - k >= SIDE) return fill<TO>(b + k * lead, lead);
  fill_part<TO>(b + k * lead, lead, count - k, SIDE);
}

template <class Finish>
INLINE void finish_square(const float* sums, int64_t rows, const Finish& finish, int64_t row, int64_t column) {
  for (int64_t i = 0; i < least(rows, SIDE); ++i)
    finish.end(row + i, column, finish.start(row + i, column) + load(sums + i * SIDE));
}

// M x N registers of sums over all of K, `rows` of them there; A begins at `row`, B at `column`.
template <int M, int N, bool ROWS, class Finish>
INLINE void squares(int64_t rows, const Word* a, int64_t lead, const Word* b, int64_t lead_b, int64_t count,
                    const Finish& finish, int64_t row, int64_t column) {
  const Word* below = a + SIDE * (ROWS ? lead : 1);
  for (int64_t i = 0; i < least(rows, M * SIDE); ++i)  // asks for what it will need
    for (int n = 0; n < N; ++n) finish.start(row + i, column + n * SIDE);
  clear<0>();
  if (M * N > 1) clear<1>();
  if (M * N > 2) clear<2>(), clear<3>();
  for (int64_t k = 0; k < count; k += SIDE) {
    fill_left<4, ROWS>(a, lead, rows, k, count);
    if (M > 1) fill_left<5, ROWS>(below, lead, rows - SIDE, k, count);
    fill_right<6>(b, lead_b, k, count);
    add_product<0, 4, 6>();
    if (M > 1) add_product<N % 4, 5, 6>();
    if (N > 1) {
      fill_right<7>(b + SIDE, lead_b, k, count);
      add_product<1, 4, 7>();
      if (M > 1) add_product<3, 5, 7>();
    }
    if (N > 2) {
      fill_right<6>(b + 2 * SIDE, lead_b, k, count);
      add_product<2, 4, 6>();
      fill_right<7>(b + 3 * SIDE, lead_b, k, count);
      add_product<3, 4, 7>();
    }
  }
  alignas(64) float sums[M * N][SIDE * SIDE];
  empty<0>(sums[0], SIDE);
  if (M * N > 1) empty<1>(sums[M * N > 1], SIDE);
  if (M * N > 2) empty<2>(sums[M * N > 2 ? 2 : 0], SIDE), empty<3>(sums[M * N > 2 ? 3 : 0], SIDE);
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n)
      finish_square(sums[m * N + n], rows - m * SIDE, finish, row + m * SIDE, column + n * SIDE);
}

// Rows of sums over all columns.
template <int M, bool ROWS, class Finish>
static void row_of_squares(int64_t rows, int64_t columns, const Word* a, int64_t lead, const Word* b, int64_t lead_b,
                           int64_t count, const Finish& finish, int64_t row) {
  constexpr int N = 4 / M;
  int64_t column = 0;
  for (; column + N * SIDE <= columns; column += N * SIDE)
    squares<M, N, ROWS>(rows, a, lead, b + column, lead_b, count, finish, row, column);
  for (; column < columns; column += SIDE)
    squares<M, 1, ROWS>(rows, a, lead, b + column, lead_b, count, finish, row, column);
}

template <bool ROWS, class Finish>
static void product_in_squares(int64_t rows, int64_t columns, int64_t count, const Word* a, int64_t lead, const Word* b,
                               int64_t lead_b, const Finish& finish) {
  alignas(64) Word room[ROWS ? 1 : 2 * SIDE * DEEP];
  int64_t lead_room = padded(count);
  for (int64_t row = 0; row < rows; row += 2 * SIDE) {
    int64_t here = rows - row;
    const Word* from = a + row * (ROWS ? lead : 1);
    if (ROWS || count > DEEP) {
      if (here > SIDE)
        row_of_squares<2, ROWS>(here, columns, from, lead, b, lead_b, count, finish, row);
      else
        row_of_squares<1, ROWS>(here, columns, from, lead, b, lead_b, count, finish, row);
      continue;
    }
    for (int64_t i = 0; i < least(2 * SIDE, here); i += SIDE)
      for (int64_t k = 0; k < count; k += SIDE)
        turn_lines(from + i + k * lead, lead, count - k, room + i * lead_room + k, lead_room);
    if (here > SIDE)
      row_of_squares<2, true>(here, columns, room, lead_room, b, lead_b, count, finish, row);
    else
      row_of_squares<1, true>(here, columns, room, lead_room, b, lead_b, count, finish, row);
  }
}
