// AVX-512 with products of bf16 pairs: 6 x 64 sums in 24 of 32 registers.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")
// said by hand: g++ before 13 reads the whole file before it heeds the pragma, and sets no macro of its own
#define HAS_AVX512
#define HAS_BF16
#include <immintrin.h>

#include "problem.h"
namespace dsv3 {
namespace {
constexpr int PANEL = 6, WIDE = 4, REGISTER = 64;  // rows and vectors of a panel of sums; bytes of a register
#include "tiles.h"

#include "scores.h"

#include "passes.h"
#include "row.h"
#include "together.h"
#include "singly.h"
}  // namespace
const Kernels avx512_bf16{"avx512_bf16", room_of, forward, delta, key_tile, query_tile, store_rows, span, together,
                          together_back, room_together, join, scores, best, forward_one, backward_one, key_one};
}  // namespace dsv3
#endif
