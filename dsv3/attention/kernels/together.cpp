// Work of queries whose heads share keys and a list: the keys by their numbers, span by span, for a tile of heads. What
// keys get from queries is added query by query, whoever does it.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

#include "key_sums.h"
#include "problem.h"
#include "work.h"

namespace dsv3 {
namespace {

using at::Tensor;

struct Tile {  // up to TILE heads of a query, and which key-value head of all is theirs
  int64_t group, b, head, heads, t;
};

// A query of all heads of a group, and the keys that it sees.
struct Together {
  const Problem& p;
  int64_t size = p.heads / p.groups, tiles = pieces(size, TILE);
  int64_t most = p.listed ? std::min(p.most * p.block_k, p.keys) : p.keys;
  int64_t named = pieces(most, 16) * 64;  // bytes of the keys' numbers
  int64_t spans = std::max<int64_t>(pieces(most, SPAN * TILE), 1), stride = (p.value + 15) / 16 * 16 + 16;

  int64_t list(int64_t group) const { return group / p.groups * p.shared + group % p.groups * p.shared / p.groups; }
  Tile tile(int64_t group, int64_t number, int64_t t) const {
    int64_t first = number * TILE;
    return {group, group / p.groups, group % p.groups * size + first, std::min(TILE, size - first), t};
  }
  // of all tiles of all queries, the last queries first: those see the most
  Tile tile(int64_t i) const {
    int64_t number = i / p.queries;
    return tile(number / tiles, number % tiles, p.queries - 1 - i % p.queries);
  }
  // the numbers of the keys that a query sees, ascending, and how many they are
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
  // the span of a tile, where those of its first head begin at `to`
  void span(const Kernels& kernels, const Tile& x, int64_t number, const int32_t* keys, int64_t count, float* to,
            char* scratch) const {
    int64_t begin = number * SPAN * TILE;
    kernels.together(p, x.b, x.head, x.heads, x.t, keys + begin, std::min(count - begin, SPAN * TILE),
                     to + number * stride, spans * stride, scratch);
  }
  // where to cut the keys into so many stretches, each named about as often; begins with 0 and ends with all
  std::vector<int64_t> stretches(int64_t list, int64_t count) const {
    int64_t blocks_q = pieces(p.queries, p.block_q), blocks_k = pieces(p.keys, p.block_k), all = 0, before = 0;
    std::vector<int64_t> often(blocks_k, p.listed ? 0 : 1), cuts{0};
    for (int64_t i = list * blocks_q; p.listed && i < (list + 1) * blocks_q; ++i)
      for (int64_t j = 0; j < p.counts[i]; ++j) ++often[p.listed[i * p.most + j]];
    for (int64_t one : often) all += one;
    for (int64_t block = 0, part = 1; block < blocks_k; before += often[block++])
      if (part < count && before > 0 && before * count >= all * part) {
        cuts.push_back(block * p.block_k);
        part = before * count / all + 1;
      }
    cuts.push_back(p.keys);
    return cuts;
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
    Tile x = all.tile(i / all.spans);
    int64_t list = all.list(x.group);
    all.span(kernels, x, i % all.spans, named + list * all.most, count[list],
             spans + (x.b * p.heads + x.head) * all.spans * all.stride, scratch);
  });
  shared_out(p.batch * p.heads, 0, [&](int64_t i, char*) {
    kernels.join(p, i / p.heads, i % p.heads, 0, spans + i * all.spans * all.stride, all.stride, all.spans);
  });
}

// Of many queries each apart.
void each_together(const Problem& p, const Kernels& kernels) {
  Together all{p};
  int64_t room = kernels.room_together(p), spans = TILE * all.spans * all.stride * 4;
  shared_out(p.batch * p.groups * all.tiles * p.queries, room + all.named + spans, [&](int64_t i, char* scratch) {
    Tile x = all.tile(i);
    int32_t* keys = (int32_t*)(scratch + room);
    float* parts = (float*)(scratch + room + all.named);
    int64_t count = all.name(all.list(x.group), x.t, keys), many = std::max<int64_t>(pieces(count, SPAN * TILE), 1);
    for (int64_t number = 0; number < many; ++number) all.span(kernels, x, number, keys, count, parts, scratch);
    for (int64_t h = 0; h < x.heads; ++h)
      kernels.join(p, x.b, x.head + h, x.t, parts + h * all.spans * all.stride, all.stride, many);
  });
}

// What every query gives to the keys of a group from one to another, and its own gradient too where `own`.
void sweep(const Together& all, const Kernels& kernels, const KeySums& sums, int64_t group, int64_t from, int64_t to,
           bool own, char* room, char* scratch) {
  const Problem& p = all.p;
  int32_t* keys = (int32_t*)(scratch + kernels.room_together(p));
  float *grad_k = sums.of_k(group, room), *grad_v = sums.of_v(group, room);
  sums.clear(group, from, to, room);
  for (int64_t t = 0; t < p.queries; ++t) {
    int32_t* last = keys + all.name(all.list(group), t, keys);
    int32_t *first = std::lower_bound(keys, last, (int32_t)from), *stop = std::lower_bound(first, last, (int32_t)to);
    if (first == stop && !own) continue;
    for (int64_t number = 0; number < all.tiles; ++number) {
      Tile x = all.tile(group, number, t);
      kernels.together_back(p, x.b, x.head, x.heads, t, first, stop - first, own, grad_k, grad_v, scratch);
    }
  }
  sums.store(kernels, group, from, to, room);
}

// Key-value heads apart: all gradients in one sweep, 5 products a tile.
void back_by_head(const Problem& p, const Kernels& kernels) {
  Together all{p};
  KeySums sums{p};
  int64_t room = kernels.room_together(p) + all.named;
  shared_out(p.batch * p.groups, room + sums.bytes, [&](int64_t i, char* scratch) {
    sweep(all, kernels, sums, i, 0, p.keys, true, scratch + room, scratch);
  });
}

// Queries apart, and then stretches of keys, 7 products a tile.
void back_by_row(const Problem& p, const Kernels& kernels) {
  Together all{p};
  KeySums sums{p};
  int64_t room = kernels.room_together(p);
  shared_out(p.batch * p.groups * all.tiles * p.queries, room + all.named, [&](int64_t i, char* scratch) {
    Tile x = all.tile(i);
    int32_t* keys = (int32_t*)(scratch + room);
    int64_t count = all.name(all.list(x.group), x.t, keys);
    kernels.together_back(p, x.b, x.head, x.heads, x.t, keys, count, true, nullptr, nullptr, scratch);
  });
  Tensor memory = at::empty({sums.bytes}, at::kByte);
  for (int64_t i = 0; i < p.batch * p.groups; ++i) {
    std::vector<int64_t> cuts = all.stretches(all.list(i), at::get_num_threads());
    shared_out((int64_t)cuts.size() - 1, room + all.named, [&](int64_t n, char* scratch) {
      sweep(all, kernels, sums, i, cuts[n], cuts[n + 1], false, (char*)memory.data_ptr(), scratch);
    });
  }
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

void backward_together(const Problem& p, const Kernels& kernels, bool by_head) {
  by_head ? back_by_head(p, kernels) : back_by_row(p, kernels);
}

}  // namespace dsv3
