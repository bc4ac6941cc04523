// Any processor: vectors as the compiler lowers them.
#include "problem.h"
namespace dsv3::experts {
namespace {
constexpr int PANEL = 2, WIDE = 4, REGISTER = 16;  // rows and vectors of a panel of sums; bytes of a register
#include "tiles.h"

#include "passes.h"
}  // namespace
const Kernels portable{"portable", rooms, hidden, out, weights, inputs};
}  // namespace dsv3::experts
