// Products in the processor's registers of matrices (AMX): 16 x 16 sums of 16 pairs of bf16 each in one instruction.
//
//     A    16 rows of 16 pairs           as `product` takes it row by row; what lies column by column is turned before
//     B    16 lines of 16 pairs          as `product` takes it, one pair of each column in a line
//     C    16 rows of 16 sums in fp32
//
// Four registers of sums, two by two or one by four, share what is loaded. Where A or B ends before a register does,
// zeros follow.

constexpr int64_t SIDE = 16;   // rows of a register, and words of a row
constexpr int64_t SHORT = 32;  // pairs at most along which a factor is turned: it is done again for each product

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

template <int TO>
INLINE void fill_left(const Word* a, int64_t lead, int64_t rows, int64_t k, int64_t count) {
  if (rows >= SIDE && count - k >= SIDE) return fill<TO>(a + k, lead);
  fill_part<TO>(a + k, lead, least(rows, SIDE), least(count - k, SIDE));
}
template <int TO>
INLINE void fill_right(const Word* b, int64_t lead, int64_t k, int64_t count) {
  if (count - k >= SIDE) return fill<TO>(b + k * lead, lead);
  fill_part<TO>(b + k * lead, lead, count - k, SIDE);
}

// N registers of sums side by side begin, and end row by row, so that whole lines of memory are written.
template <int SUM, int N, class Finish>
INLINE void begin(int64_t, const Finish&, int64_t, int64_t) {
  clear<SUM>();
  if (N > 1) clear<SUM + 1>();
  if (N > 2) clear<SUM + 2>(), clear<SUM + 3>();
}
template <int SUM, int N, class Finish>
INLINE void end(int64_t rows, const Finish& finish, int64_t row, int64_t column) {
  constexpr int64_t LEAD = N * SIDE;
  alignas(64) float sums[SIDE * LEAD];
  empty<SUM>(sums, LEAD);
  if (N > 1) empty<SUM + 1>(sums + SIDE, LEAD);
  if (N > 2) empty<SUM + 2>(sums + 2 * SIDE, LEAD), empty<SUM + 3>(sums + 3 * SIDE, LEAD);
  for (int64_t i = 0; i < least(rows, SIDE); ++i)
    for (int64_t n = 0; n < LEAD; n += SIDE) finish.end(row + i, column + n, load(sums + i * LEAD + n));
}

// Sums that are added to what is there are loaded from and stored in its place.
template <int SUM>
INLINE void begin_in_place(int64_t rows, const float* from, int64_t lead) {
  if (rows >= SIDE) return fill<SUM>((const Word*)from, lead);
  fill_part<SUM>((const Word*)from, lead, rows, SIDE);
}
template <int SUM>
INLINE void end_in_place(int64_t rows, float* to, int64_t lead) {
  if (rows >= SIDE) return empty<SUM>(to, lead);
  alignas(64) float sums[SIDE * SIDE];
  empty<SUM>(sums, SIDE);
  for (int64_t i = 0; i < rows; ++i) store(to + i * lead, load(sums + i * SIDE));
}
template <int SUM, int N>
INLINE void begin(int64_t rows, const Add& finish, int64_t row, int64_t column) {
  const float* from = finish.c + row * finish.lead + column;
  if (finish.fresh) return begin<SUM, N, Add>(rows, finish, row, column);
  begin_in_place<SUM>(rows, from, finish.lead);
  if (N > 1) begin_in_place<SUM + 1>(rows, from + SIDE, finish.lead);
  if (N > 2) begin_in_place<SUM + 2>(rows, from + 2 * SIDE, finish.lead);
  if (N > 2) begin_in_place<SUM + 3>(rows, from + 3 * SIDE, finish.lead);
}
template <int SUM, int N>
INLINE void end(int64_t rows, const Add& finish, int64_t row, int64_t column) {
  float* to = finish.c + row * finish.lead + column;
  end_in_place<SUM>(rows, to, finish.lead);
  if (N > 1) end_in_place<SUM + 1>(rows, to + SIDE, finish.lead);
  if (N > 2) end_in_place<SUM + 2>(rows, to + 2 * SIDE, finish.lead);
  if (N > 2) end_in_place<SUM + 3>(rows, to + 3 * SIDE, finish.lead);
}

// M x N registers of sums over all of K, `rows` of them there; A begins at `row`, B at `column`.
template <int M, int N, class Finish>
INLINE void squares(int64_t rows, const Word* a, int64_t lead, const Word* b, int64_t lead_b, int64_t count,
                    const Finish& finish, int64_t row, int64_t column) {
  for (int64_t i = 0; i < least(rows, M * SIDE); ++i)
    for (int n = 0; n < N; ++n) finish.start(row + i, column + n * SIDE);  // asks for what it will need
  constexpr int BELOW = M > 1 ? N : 0;  // the register of the first sums below
  begin<0, N>(rows, finish, row, column);
  if (M > 1) begin<BELOW, N>(rows - SIDE, finish, row + SIDE, column);
  for (int64_t k = 0; k < count; k += SIDE) {
    fill_left<4>(a, lead, rows, k, count);
    if (M > 1) fill_left<5>(a + SIDE * lead, lead, rows - SIDE, k, count);
    fill_right<6>(b, lead_b, k, count);
    add_product<0, 4, 6>();
    if (M > 1) add_product<BELOW, 5, 6>();
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
  end<0, N>(rows, finish, row, column);
  if (M > 1) end<BELOW, N>(rows - SIDE, finish, row + SIDE, column);
}

template <int M, class Finish>
static __attribute__((noinline)) void row_of_squares(int64_t rows, int64_t columns, const Word* a, int64_t lead,
                                                     const Word* b, int64_t lead_b, int64_t count,
                                                     const Finish& finish, int64_t row) {
  constexpr int N = 4 / M;
  int64_t column = 0;
  for (; column + N * SIDE <= columns; column += N * SIDE)
    squares<M, N>(rows, a, lead, b + column, lead_b, count, finish, row, column);
  for (; column < columns; column += SIDE)
    squares<M, 1>(rows, a, lead, b + column, lead_b, count, finish, row, column);
}

template <bool ROWS, class Finish>
static void product_in_squares(int64_t rows, int64_t columns, int64_t count, const Word* a, int64_t lead, const Word* b,
                               int64_t lead_b, const Finish& finish) {
  alignas(64) Word room[ROWS ? 1 : 2 * SIDE * SHORT];
  for (int64_t row = 0; row < rows; row += 2 * SIDE) {
    const Word* from = ROWS ? a + row * lead : room;
    if (!ROWS)
      for (int64_t i = 0; i < least(2 * SIDE, rows - row); i += SIDE)
        turn_rows(a + row + i, lead, count, SIDE, room + i * SHORT, SHORT);
    if (rows - row > SIDE)
      row_of_squares<2>(rows - row, columns, from, ROWS ? lead : SHORT, b, lead_b, count, finish, row);
    else
      row_of_squares<1>(rows - row, columns, from, ROWS ? lead : SHORT, b, lead_b, count, finish, row);
  }
}
