// Work of queries whose heads share keys and a list: the keys by their numbers, span by span, for a tile of heads.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "problem.h"
#include "work.h"

namespace dsv3 {
namespace {

using at::Tensor;

// A query of all heads of a group, and the keys that it sees.
struct Together {
  const Problem& p;
  int64_t group = p.heads / p.groups, tiles = pieces(group, TILE);
  int64_t most = p.listed ? std::min(p.most * p.block_k, p.keys) : p.keys;
  int64_t spans = std::max<int64_t>(pieces(most, SPAN * TILE), 1), stride = (p.value + 15) / 16 * 16 + 16;

  // their numbers, ascending, and how many they are
  int64_t name(int64_t list, int64_t t, int32_t* to) const {
    int64_t blocks_q = pieces(p.queries, p.block_q), number = list * blocks_q + t / p.block_q, count = 0;
    const int32_t *blocks = p.listed + number * p.most, *rank = p.rank ? p.rank + list * p.keys : nullptr;
    int64_t stop = p.keys - p.queries + t + 1, limit = rank ? p.limit[list * p.queries + t] : 0;
    for (int64_t j = 0; j < (p.listed ? p.counts[number] : pieces(stop, p.block_k)); ++j) {
      int64_t first = (p.listed ? blocks[j] : j) * p.block_k;
      for (int64_t key = first; key < std::min(first + p.block_k, stop); ++key)
        if (!rank || rank[key] <= limit) to[count++] = key;
    }
    return count;
  }
  // the span of a tile of heads, where those of the tile's first head begin at `to`
  void span(const Kernels& kernels, int64_t b, int64_t head, int64_t t, int64_t number, const int32_t* keys,
            int64_t count, float* to, char* scratch) const {
    int64_t heads = std::min(TILE, group - head % group), begin = number * SPAN * TILE;
    kernels.together(p, b, head, heads, t, keys + begin, std::min(count - begin, SPAN * TILE), to + number * stride,
                     spans * stride, scratch);
  }
};

// Of one query its spans apart, so that threads outnumber tiles of heads.
void one_together(const Problem& p, const Kernels& kernels) {
  Together all{p};
  int64_t lists = p.batch * p.shared;
  Tensor keys = at::empty({lists, all.most}, at::kInt), counts = at::empty({lists}, at::kLong);
  int32_t* named = keys.data_ptr<int32_t>();
  int64_t* count = counts.data_ptr<int64_t>();
  for (int64_t i = 0; i < lists; ++i) count[i] = all.name(i, 0, named + i * all.most);
  Tensor parts = at::empty({p.batch * p.heads * all.spans * all.stride}, at::kFloat);
  float* spans = parts.data_ptr<float>();
  shared_out(p.batch * p.groups * all.tiles * all.spans, kernels.room_together(p), [&](int64_t i, char* scratch) {
    int64_t tile = i / all.spans, group = tile / all.tiles, b = group / p.groups, g = group % p.groups;
    int64_t list = b * p.shared + g * p.shared / p.groups, head = g * all.group + tile % all.tiles * TILE;
    all.span(kernels, b, head, 0, i % all.spans, named + list * all.most, count[list],
             spans + (b * p.heads + head) * all.spans * all.stride, scratch);
  });
  shared_out(p.batch * p.heads, 0, [&](int64_t i, char*) {
    kernels.join(p, i / p.heads, i % p.heads, 0, spans + i * all.spans * all.stride, all.stride, all.spans);
  });
}

// Of many queries each apart.
void each_together(const Problem& p, const Kernels& kernels) {
  Together all{p};
  int64_t room = kernels.room_together(p), named = pieces(all.most, 16) * 64, spans = TILE * all.spans * all.stride * 4;
  shared_out(p.batch * p.groups * all.tiles * p.queries, room + named + spans, [&](int64_t i, char* scratch) {
    int64_t t = p.queries - 1 - i % p.queries, tile = i / p.queries, group = tile / all.tiles, b = group / p.groups;
    int64_t g = group % p.groups, head = g * all.group + tile % all.tiles * TILE;
    int32_t* keys = (int32_t*)(scratch + room);
    float* parts = (float*)(scratch + room + named);
    int64_t count = all.name(b * p.shared + g * p.shared / p.groups, t, keys);
    for (int64_t number = 0; number < std::max<int64_t>(pieces(count, SPAN * TILE), 1); ++number)
      all.span(kernels, b, head, t, number, keys, count, parts, scratch);
    for (int64_t h = 0; h < std::min(TILE, all.group - head % all.group); ++h)
      kernels.join(p, b, head + h, t, parts + h * all.spans * all.stride, all.stride,
                   std::max<int64_t>(pieces(count, SPAN * TILE), 1));
  });
}

}  // namespace

// Whether many heads share keys, and a query its list with those of the other heads alone.
bool shared_by_many(const Problem& p) {
  bool alone = p.queries == 1 || (p.listed && p.block_q == 1);
  return alone && !p.bias && p.heads / p.groups >= MANY_HEADS && p.shared <= p.groups;
}

void forward_together(const Problem& p, const Kernels& kernels) {
  p.queries == 1 ? one_together(p, kernels) : each_together(p, kernels);
}

}  // namespace dsv3
