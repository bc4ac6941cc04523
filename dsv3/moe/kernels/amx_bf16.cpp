// AVX-512, and bf16 in the processor's registers of matrices (AMX).
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")
// said by hand: g++ before 13 reads the whole file before it heeds the pragma, and sets no macro of its own
#define HAS_AVX512
#define HAS_BF16
#define HAS_AMX
#include <immintrin.h>

#include "problem.h"
namespace dsv3::experts {
namespace {
constexpr int PANEL = 6, WIDE = 4, REGISTER = 64;  // rows and vectors of a panel of sums; bytes of a register
#include "tiles.h"

#include "passes.h"
}  // namespace
const Kernels amx_bf16{"amx_bf16", rooms, hidden, out, weights, inputs};
}  // namespace dsv3::experts
#endif
