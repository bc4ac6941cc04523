// torch.ops.dsv3_kernels.choose: which blocks of keys one block of queries sees, in all sequences and heads, in one call.
//
// The walk of `dsv3.attention.select.tree` for a query alone, where torch's operators are too small to be worth their
// calls: level by level the best `beam` nodes are opened, and the one that the query lies in; of the leaves the best
// `free` are seen beside the first, the previous and the `begun` own ones. branching=0: one level, all of it scored.
// Equal scores go to the earlier node; a score that is no number chooses no leaf and hides no node.

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "problem.h"
#include "work.h"

namespace dsv3 {

const Kernels& chosen(const std::string& instructions);  // of operators.cpp

namespace {

using at::Tensor;

constexpr int64_t ALONE = 1 << 19;  // numbers that one thread reads in the time that others take to wake up
constexpr float NONE = -std::numeric_limits<float>::infinity();

struct Search {
  int64_t complete, free, beam, branching, width;
  const Kernels* kernels;

  // nodes of a level that end before the query; also the number of the node that it lies in
  int64_t ending(int64_t level) const {
    int64_t count = complete;
    for (; level > 0; --level) count /= branching;
    return count;
  }
  // the highest level on which a node has to be left out, or the leaves
  int64_t first() const {
    int64_t found = 0;
    if (branching)
      for (int64_t level = 1; ending(level); ++level)
        if (ending(level) > beam) found = level;
    return found;
  }
  int64_t most_nodes() const { return branching ? branching * (beam + 1) : complete; }
};

// The places of the `most` best of `count` scores, ascending; a heap of those kept so far, the worst on top.
int64_t best(const float* score, int64_t count, int64_t most, int32_t* place) {
  auto better = [score](int32_t a, int32_t b) { return score[a] > score[b] || (score[a] == score[b] && a < b); };
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (!(score[i] > NONE)) continue;
    if (kept == most) {
      if (!(score[i] > score[place[0]])) continue;
      std::pop_heap(place, place + kept--, better);
    }
    place[kept++] = i;
    std::push_heap(place, place + kept, better);
  }
  std::sort(place, place + kept);
  return kept;
}

struct Room {
  int32_t *nodes, *place;
  float *score, *query;
};

// One search; the chosen leaves ascending into room.nodes. Returns how many, and adds up the scores it took.
int64_t leaves(const Search& s, const std::vector<const float*>& levels, const Room& room, int64_t* looked_at) {
  int64_t level = s.first(), count = s.branching ? s.ending(level) : s.complete - 2;
  std::iota(room.nodes, room.nodes + count, s.branching ? 0 : 1);
  for (;; --level) {
    s.kernels->scores(room.query, levels[level], s.width, room.nodes, count, room.score);
    *looked_at += count;
    if (level == 0) break;
    for (int64_t i = 0; i < count; ++i)
      if (!(room.score[i] > NONE)) room.score[i] = std::numeric_limits<float>::lowest();
    int64_t opened = best(room.score, count, s.beam, room.place), before = s.ending(level), below = s.ending(level - 1);
    for (int64_t i = 0; i < opened; ++i) room.place[i] = room.nodes[room.place[i]];
    room.place[opened++] = before;
    count = 0;
    for (int64_t i = 0; i < opened; ++i)
      for (int64_t child = room.place[i] * s.branching; child < (room.place[i] + 1) * s.branching; ++child)
        if (child < below) room.nodes[count++] = child;
  }
  for (int64_t i = 0; i < count; ++i)
    if (room.nodes[i] == 0 || room.nodes[i] >= s.complete - 1) room.score[i] = NONE;
  int64_t found = best(room.score, count, s.free, room.place);
  for (int64_t i = 0; i < found; ++i) room.nodes[i] = room.nodes[room.place[i]];
  return found;
}

std::tuple<Tensor, Tensor, int64_t> choose(const Tensor& query, at::TensorList nodes, int64_t complete, int64_t free,
                                           int64_t beam, int64_t branching, int64_t own, int64_t begun,
                                           std::string_view instructions) {
  TORCH_CHECK_VALUE(query.dim() == 4 && query.size(2) == 1 && query.scalar_type() == at::kFloat,
                    "query: must be [B, h, 1, W] in float32");
  TORCH_CHECK_VALUE(complete > 2 && free > 0 && beam > 0 && branching != 1 && branching >= 0 && own >= begun &&
                        begun > 0 && complete < (int64_t(1) << 31),
                    "complete, free, beam, branching, own, begun: must be those of a search that scores");
  Search s{complete, free, beam, branching, query.size(3), &chosen(std::string(instructions))};
  std::vector<Tensor> levels;
  int64_t batch = query.size(0), heads = query.size(1), lists = batch * heads;
  for (const Tensor& level : nodes) {
    bool fits = level.dim() == 4 && level.size(0) == batch && heads % level.size(1) == 0 &&
                level.size(1) == nodes[0].size(1) && level.size(3) == s.width && level.scalar_type() == at::kFloat;
    TORCH_CHECK_VALUE(fits, "nodes: must be [B, g, n, W] in float32, with g dividing h");
    levels.push_back(level.contiguous());
  }
  for (int64_t level = s.first(); level >= 0; --level)
    TORCH_CHECK_VALUE(level < (int64_t)levels.size() && s.ending(level) <= levels[level].size(2),
                      "nodes: are fewer than those before the query");
  Tensor rows = query.contiguous(), counts = at::empty({batch, heads, 1}, at::kLong);
  Tensor indices = at::zeros({batch, heads, 1, free + 2 + own}, at::kLong);
  int64_t *list = indices.data_ptr<int64_t>(), *length = counts.data_ptr<int64_t>(), most = s.most_nodes();
  int64_t groups = nodes[0].size(1), wide = (s.width + 15) / 16 * 16;
  std::atomic<int64_t> computed{0};
  auto search = [&](int64_t i, char* scratch) {
    Room room{(int32_t*)scratch, (int32_t*)scratch + most, (float*)scratch + 2 * most, (float*)scratch + 3 * most};
    std::fill(std::copy_n(rows.data_ptr<float>() + i * s.width, s.width, room.query), room.query + wide, 0.0f);
    std::vector<const float*> trees;
    for (const Tensor& level : levels)
      trees.push_back(level.data_ptr<float>() + i / (heads / groups) * level.size(2) * s.width);
    int64_t looked_at = 0, *to = list + i * (free + 2 + own), *begin = to;
    int64_t found = leaves(s, trees, room, &looked_at);
    *to++ = 0;
    to = std::copy_n(room.nodes, found, to);
    for (int64_t block = complete - 1; block < complete + begun; ++block) *to++ = block;
    length[i] = to - begin;
    computed += looked_at;
  };
  int64_t threads = lists * most * s.width < ALONE ? 1 : at::get_num_threads();
  shared_out(lists, (3 * most + wide) * 4, search, threads);
  return {indices, counts, computed.load()};
}

}  // namespace
}  // namespace dsv3

TORCH_LIBRARY_FRAGMENT(dsv3_kernels, m) {
  m.def(
      "choose(Tensor query, Tensor[] nodes, int complete, int free, int beam, int branching, int own, int begun, "
      "str instructions) -> (Tensor, Tensor, int)");
}

TORCH_LIBRARY_IMPL(dsv3_kernels, CPU, m) { m.impl("choose", dsv3::choose); }
