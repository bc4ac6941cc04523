// torch.ops.dsv3_kernels.choose: which blocks of keys each block of queries sees, in all sequences and heads.
//
// The walks of `dsv3.attention.select.tree` one by one, so that no search waits for a longer one beside it: level by
// level the best `beam` nodes are opened, and the one that the query lies in; of the leaves the best `free` are seen
// beside the first, the previous and the own ones. branching=0: one level, all of it scored. bounds: what a beam finds
// gives the threshold that a node must reach to be opened in a second walk. It needs no allowance for rounding as in
// tensors: all scores are summed in one order, so no bound falls below that of what lies under it.
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
constexpr int64_t TOGETHER = 16;    // searches that a thread takes at a time
constexpr int64_t DEPTH = 64;       // levels that a tree of 2^63 leaves has
constexpr float NONE = -std::numeric_limits<float>::infinity();

struct Tree {  // the levels of one, leaves first, and how it is walked
  const float* const* level;
  int64_t width, branching;
  bool bounds;
  const Kernels* kernels;
};

struct Room {
  int32_t *nodes, *other, *key;
  float *score, *query;
};

struct Looked {  // scores taken: by the second walk of each level, and in all
  int64_t opened[DEPTH] = {}, computed = 0;
};

struct Walk {
  const Tree& tree;
  Room room;
  int64_t complete, free, beam;

  // nodes of a level that end before the query; also the number of the node that it lies in
  int64_t ending(int64_t level) const {
    int64_t count = complete;
    for (; level > 0; --level) count /= tree.branching;
    return count;
  }
  // the highest level on which a node has to be left out, or the leaves
  int64_t first() const {
    int64_t found = 0;
    if (tree.branching)
      for (int64_t level = 1; ending(level); ++level)
        if (ending(level) > beam) found = level;
    return found;
  }
  void score(int64_t level, int64_t count, Looked* looked) const {
    tree.kernels->scores(room.query, tree.level[level], tree.width, room.nodes, count, room.score);
    looked->computed += count;
  }
  int64_t best(int64_t count, int64_t most) const {
    return tree.kernels->best(room.score, count, most, room.key, room.other);
  }
  // the children of `opened` nodes, which stand in room.other, that end before the query, into room.nodes
  int64_t children(int64_t opened, int64_t below) const {
    int64_t count = 0;
    for (int64_t i = 0; i < opened; ++i) {
      int64_t child = room.other[i] * tree.branching, last = std::min(child + tree.branching, below);
      for (; child < last; ++child) room.nodes[count++] = child;
    }
    return count;
  }
  // of `count` scored leaves the best, ascending, into room.nodes; the worst of them, if they are as many as asked for
  int64_t leaves(int64_t count, float* worst) const {
    for (int64_t i = 0; i < count; ++i)
      if (room.nodes[i] == 0 || room.nodes[i] >= complete - 1) room.score[i] = NONE;
    int64_t found = best(count, free);
    *worst = found < free ? NONE : std::numeric_limits<float>::infinity();
    for (int64_t i = 0; i < found; ++i) {
      *worst = std::min(*worst, room.score[room.other[i]]);
      room.nodes[i] = room.nodes[room.other[i]];
    }
    return found;
  }
  int64_t along_beam(float* worst, Looked* looked) const {
    int64_t level = first(), count = tree.branching ? ending(level) : complete - 2;
    std::iota(room.nodes, room.nodes + count, tree.branching ? 0 : 1);
    for (;; --level) {
      score(level, count, looked);
      if (level == 0) return leaves(count, worst);
      for (int64_t i = 0; i < count; ++i)
        if (!(room.score[i] > NONE)) room.score[i] = std::numeric_limits<float>::lowest();
      int64_t opened = best(count, beam);
      for (int64_t i = 0; i < opened; ++i) room.other[i] = room.nodes[room.other[i]];
      room.other[opened++] = ending(level);
      count = children(opened, ending(level - 1));
    }
  }
  int64_t above(float threshold, Looked* looked) const {
    int64_t level = 0, opened = 1;
    while (ending(level)) ++level;
    room.other[0] = 0;
    while (true) {
      int64_t count = children(opened, ending(--level));
      score(level, count, looked);
      looked->opened[level] += count;
      if (level == 0) return leaves(count, &threshold);
      opened = 0;
      for (int64_t i = 0; i < count; ++i)  // nothing is known of what is under a bound that is no number
        if (!(room.score[i] < threshold)) room.other[opened++] = room.nodes[i];
      room.other[opened++] = ending(level);
    }
  }
  // which leaves are seen besides the forced ones, into room.nodes; returns how many
  int64_t find(Looked* looked) const {
    float worst;
    int64_t found = along_beam(&worst, looked);
    return tree.bounds ? above(worst, looked) : found;
  }
};

// The list of one block of queries, ascending; returns its length.
int64_t listed(const Walk& walk, int64_t own, int64_t newest, int64_t* list, Looked* looked) {
  int64_t *to = list, complete = walk.complete, past = std::min<int64_t>(complete, 2) + walk.free;
  if (past == complete) {
    for (int64_t block = 0; block < complete; ++block) *to++ = block;
  } else {
    int64_t found = walk.free ? walk.find(looked) : 0;
    *to++ = 0;
    to = std::copy_n(walk.room.nodes, found, to);
    *to++ = complete - 1;
  }
  for (int64_t block = complete; block <= std::min(newest, complete + own - 1); ++block) *to++ = block;
  return to - list;
}

// The query as nodes are multiplied with it: for bounds its positive part, then its negative one.
void prepare(const float* row, int64_t width, bool bounds, float* query) {
  int64_t wide = width * (bounds ? 2 : 1);
  std::fill(query + wide / 16 * 16, query + (wide + 15) / 16 * 16, 0.0f);
  if (!bounds) std::copy_n(row, width, query);
  for (int64_t c = 0; bounds && c < width; ++c) {
    query[c] = row[c] < 0 ? 0 : row[c];  // a query that is no number finds no block
    query[width + c] = row[c] > 0 ? 0 : row[c];
  }
}

// The most nodes that a search looks at on one level, and room for a vector more.
int64_t nodes_at_most(const int64_t* search, int64_t number, int64_t branching, bool bounds) {
  int64_t most = 0;
  for (int64_t i = 0; i < number; ++i) {
    int64_t complete = search[3 * i], beam = search[3 * i + 2], past = search[3 * i + 1] + std::min<int64_t>(complete, 2);
    TORCH_CHECK_VALUE(
        complete >= 0 && complete < (int64_t(1) << 31) && beam > 0 && search[3 * i + 1] >= 0 && past <= complete,
        "searches: must be complete key blocks, how many others are seen, and a beam");
    if (past == complete) continue;  // nothing is left out, so nothing is scored
    int64_t along_beam = branching * (std::min(beam, complete) + 1), all = complete + branching;
    most = std::max(most, branching && !bounds ? std::min(along_beam, all) : all);
  }
  return (most + 16) / 16 * 16;
}

// searches: in one piece
void check(const Tensor& query, at::TensorList nodes, const Tensor& searches, int64_t branching, bool bounds) {
  TORCH_CHECK_VALUE(query.dim() == 4 && query.scalar_type() == at::kFloat,
                    "query: must be [B, h, Nq, W] in float32");
  TORCH_CHECK_VALUE(searches.dim() == 2 && searches.size(0) == query.size(2) && searches.size(1) == 3 &&
                        searches.scalar_type() == at::kLong,
                    "searches: must be [Nq, 3] of int64");
  TORCH_CHECK_VALUE(branching > 1 || (branching == 0 && !bounds), "branching=", branching,
                    ": must be 0, where all leaves are scored by their means, or more than 1");
  TORCH_CHECK_VALUE((int64_t)nodes.size() <= DEPTH, "nodes: have more than ", DEPTH, " levels");
  int64_t complete = 0, level = 0;
  for (int64_t i = 0; i < searches.size(0); ++i) complete = std::max(complete, searches.data_ptr<int64_t>()[3 * i]);
  for (const Tensor& one : nodes) {
    bool fits = one.dim() == 4 && one.size(0) == query.size(0) && one.size(1) && query.size(1) % one.size(1) == 0 &&
                one.size(1) == nodes[0].size(1) && one.size(3) == query.size(3) * (bounds ? 2 : 1) &&
                one.scalar_type() == at::kFloat;
    TORCH_CHECK_VALUE(fits, "nodes: must be [B, g, n, W], or 2 W for bounds, in float32, with g dividing h");
  }
  do {
    TORCH_CHECK_VALUE(level < (int64_t)nodes.size() && complete <= nodes[level++].size(2),
                      "nodes: are fewer than those before the query");
  } while (branching && (complete /= branching));
}

std::tuple<Tensor, Tensor, Tensor, int64_t> choose(const Tensor& query, at::TensorList nodes, const Tensor& searches,
                                                   int64_t own, int64_t newest, int64_t longest, int64_t branching,
                                                   bool bounds, std::string_view instructions) {
  Tensor each = searches.contiguous();
  check(query, nodes, each, branching, bounds);
  TORCH_CHECK_VALUE(own > 0, "own=", own, ": must be positive, a query lies in a block");
  int64_t batch = query.size(0), heads = query.size(1), number = query.size(2), width = query.size(3);
  Tensor rows = query.stride(3) == 1 ? query : query.contiguous();
  std::vector<Tensor> levels;
  for (const Tensor& level : nodes) levels.push_back(level.contiguous());
  const int64_t* search = each.data_ptr<int64_t>();
  for (int64_t i = 0; i < number; ++i)
    TORCH_CHECK_VALUE(search[3 * i + 1] + std::min<int64_t>(search[3 * i], 2) + own <= longest,
                      "longest: a list has more blocks");
  int64_t most = nodes_at_most(search, number, branching, bounds), wide = width * (bounds ? 2 : 1);
  Tensor counts = at::empty({batch, heads, number}, at::kLong);
  Tensor indices = at::zeros({batch, heads, number, longest}, at::kLong);
  Tensor opened = at::zeros({bounds ? (int64_t)levels.size() : 0}, at::kLong);
  int64_t *list = indices.data_ptr<int64_t>(), *length = counts.data_ptr<int64_t>();
  int64_t share = heads / nodes[0].size(1), chunks = pieces(number, TOGETHER);
  const Kernels& kernels = chosen(std::string(instructions));
  std::vector<std::atomic<int64_t>> looked_at(levels.size() + 1);
  auto some = [&](int64_t piece, char* scratch) {
    int64_t line = piece / chunks, begin = piece % chunks * TOGETHER, end = std::min(begin + TOGETHER, number);
    const float* at[DEPTH] = {};
    for (size_t l = 0; l < levels.size(); ++l)
      at[l] = levels[l].data_ptr<float>() + line / share * levels[l].size(2) * wide;
    Room room{(int32_t*)scratch, (int32_t*)scratch + most, (int32_t*)scratch + 2 * most, (float*)scratch + 3 * most,
              (float*)scratch + 4 * most};
    Tree tree{at, wide, branching, bounds, &kernels};
    Looked looked;
    const float* from = rows.data_ptr<float>() + line / heads * rows.stride(0) + line % heads * rows.stride(1);
    for (int64_t i = begin; i < end; ++i) {
      prepare(from + i * rows.stride(2), width, bounds, room.query);
      Walk walk{tree, room, search[3 * i], search[3 * i + 1], search[3 * i + 2]};
      int64_t row = line * number + i;
      length[row] = listed(walk, own, newest, list + row * longest, &looked);
    }
    for (size_t l = 0; l < levels.size(); ++l) looked_at[l] += looked.opened[l];
    looked_at.back() += looked.computed;
  };
  int64_t threads = batch * heads * number * most * wide < ALONE ? 1 : at::get_num_threads();
  shared_out(batch * heads * chunks, 4 * (4 * most + (wide + 15) / 16 * 16), some, threads);
  for (int64_t l = 0; l < opened.numel(); ++l) opened.data_ptr<int64_t>()[l] = looked_at[l];
  return {indices, counts, opened, looked_at.back().load()};
}

}  // namespace
}  // namespace dsv3

TORCH_LIBRARY_FRAGMENT(dsv3_kernels, m) {
  m.def(
      "choose(Tensor query, Tensor[] nodes, Tensor searches, int own, int newest, int longest, int branching, "
      "bool bounds, str instructions) -> (Tensor, Tensor, Tensor, int)");
}

TORCH_LIBRARY_IMPL(dsv3_kernels, CPU, m) { m.impl("choose", dsv3::choose); }
