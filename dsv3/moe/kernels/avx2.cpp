// AVX2 and FMA: 6 x 16 sums in 12 of 16 registers.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma")
#define HAS_AVX2
#include <immintrin.h>

#include "problem.h"
namespace dsv3::experts {
namespace {
constexpr int PANEL = 6, WIDE = 2, REGISTER = 32;  // rows and vectors of a panel of sums; bytes of a register
#include "tiles.h"

#include "passes.h"
}  // namespace
const Kernels avx2{"avx2", rooms, hidden, out, weights, inputs};
}  // namespace dsv3::experts
#endif
