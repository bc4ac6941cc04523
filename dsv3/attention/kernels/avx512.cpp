// AVX-512 without bf16: pairs are widened and multiplied in fp32.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#include <immintrin.h>

#include "problem.h"
namespace dsv3 {
namespace {
constexpr int PANEL = 6, WIDE = 4;  // rows and vectors of a panel of sums
#include "tiles.h"

#include "passes.h"
}  // namespace
const Kernels avx512{"avx512", room_of, forward, delta, key_tile, query_tile, store_rows};
}  // namespace dsv3
#endif
