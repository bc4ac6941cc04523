// Any processor: vectors as the compiler lowers them.
#include "problem.h"
namespace dsv3 {
namespace {
constexpr int PANEL = 2, WIDE = 4, REGISTER = 16;  // rows and vectors of a panel of sums; bytes of a register
#include "tiles.h"

#include "scores.h"

#include "passes.h"
#include "row.h"
#include "together.h"
#include "singly.h"
}  // namespace
const Kernels portable{"portable", room_of, forward, delta, key_tile, query_tile, store_rows, span, together,
                       together_back, room_together, join, scores, best, forward_one, backward_one, key_one};
}  // namespace dsv3
