// Products in bf16 where no instruction multiplies pairs.
//
//     C = A B = A' B' + A" B"      with A' and B' the upper numbers of all words, A" and B" the lower ones, in fp32
//
// To take pairs apart on the way, a panel would need more registers than there are. So both factors are widened first,
// as much of them as caches hold: HIGH rows of A and a strip of B, both DEEP words long. Sums wait aside for the next
// words. All three lie on the stack, so that the memory that torch sees taken is that of any other processor.

constexpr int64_t DEEP = 256, HIGH = 16 * PANEL, ACROSS = WIDE * LANES;
constexpr int64_t FEW = 4;  // rows for which widening B takes longer than reading it twice

static void widen(const Word* from, int64_t lead, int64_t rows, int64_t columns, Word* upper, int64_t lead_to,
                  Word* lower) {
  for (int64_t r = 0; r < rows; ++r, from += lead, upper += lead_to, lower += lead_to) {
    int64_t c = 0;
    for (; c + LANES <= columns; c += LANES) {
      Bits both = *(const LooseBits*)(from + c);
      *(LooseBits*)(upper + c) = both & 0xffff0000u;
      *(LooseBits*)(lower + c) = both << 16;
    }
    for (; c < columns; ++c) upper[c] = from[c] & 0xffff0000u, lower[c] = from[c] << 16;
  }
}

template <class Finish>
struct Part {  // of a product: where it begins, and whether along K it is the first, the last
  const Finish& finish;
  int64_t row, column;
  float* aside;
  bool first, last;
  INLINE_MEMBER Vector start(int64_t r, int64_t c) const {
    return first ? finish.start(row + r, column + c) : load(aside + r * ACROSS + c);
  }
  INLINE_MEMBER void end(int64_t r, int64_t c, Vector sum) const {
    last ? finish.end(row + r, column + c, sum) : store(aside + r * ACROSS + c, sum);
  }
};

// FEW rows or less, summed in the same order.
template <int M, bool ROWS, class Finish>
static void few_rows(int64_t columns, int64_t count, const Word* a, int64_t lead, const Word* b, int64_t lead_b,
                     const Finish& finish, int64_t row) {
  constexpr int N = WHOLE / LANES;
  for (int64_t column = 0; column < columns; column += WHOLE) {
    Vector sum[M][N];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sum[m][n] = finish.start(row + m, column + LANES * n);
    for (int64_t from = 0; from < count; from += DEEP)
      for (int upper = 1; upper >= 0; --upper)
        for (int64_t k = from; k < least(from + DEEP, count); ++k)
#pragma GCC unroll 8
          for (int n = 0; n < N; ++n) {
            Bits both = *(const LooseBits*)(b + k * lead_b + column + LANES * n);
            Bits line = upper ? both & 0xffff0000u : both << 16;
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
              Word one = ROWS ? a[m * lead + k] : a[k * lead + m];
              sum[m][n] = multiplied<false>(sum[m][n], upper ? one & 0xffff0000u : one << 16, line);
            }
          }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) finish.end(row + m, column + LANES * n, sum[m][n]);
  }
}

template <bool ROWS, class Finish>
static void product_widened(int64_t rows, int64_t columns, int64_t count, const Word* a, int64_t lead, const Word* b,
                            int64_t lead_b, const Finish& finish) {
  if (rows <= FEW) {
    int64_t row = 0, step = ROWS ? lead : 1;
    for (; row + 2 <= rows; row += 2)
      few_rows<2, ROWS>(columns, count, a + row * step, lead, b, lead_b, finish, row);
    if (row < rows) few_rows<1, ROWS>(columns, count, a + row * step, lead, b, lead_b, finish, row);
    return;
  }
  alignas(64) Word left[HIGH * 2 * DEEP], right[2 * DEEP * ACROSS];
  alignas(64) float aside[HIGH * ACROSS];
  for (int64_t row = 0; row < rows; row += HIGH) {
    int64_t high = least(HIGH, rows - row);
    for (int64_t column = 0; column < columns; column += ACROSS) {
      int64_t across = least(ACROSS, columns - column);
      int64_t k = 0, deep;
      do {  // once even where there is nothing to sum
        deep = least(DEEP, count - k);
        int64_t lead_left = ROWS ? 2 * deep : high;
        if (column == 0 || count > DEEP) {
          if (ROWS)
            widen(a + row * lead + k, lead, high, deep, left, lead_left, left + deep);
          else
            widen(a + k * lead + row, lead, deep, high, left, lead_left, left + deep * high);
        }
        widen(b + k * lead_b + column, lead_b, deep, across, right, across, right + deep * across);
        Part<Finish> part{finish, row, column, aside, k == 0, k + deep == count};
        product_in_strips<false, ROWS, Far::none>(high, across, 2 * deep, left, lead_left, right, across, part);
        k += deep;
      } while (k < count);
    }
  }
}
