// Work of queries whose heads share keys and a list: the keys by their numbers, span by span, for a tile of heads. What
// keys get from queries is added query by query, whoever does it.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

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
  // the tiles of heads of a query's group, each with its first head and their number
  template <class Work>
  void each_tile(int64_t g, const Work& work) const {
    for (int64_t head = g * group; head < (g + 1) * group; head += TILE)
      work(head, std::min(TILE, (g + 1) * group - head));
  }
  // keys at which so many stretches begin, and end, in which the queries name about as many
  std::vector<int64_t> stretches(int64_t list, int64_t count) const {
    int64_t blocks_q = pieces(p.queries, p.block_q), blocks_k = pieces(p.keys, p.block_k), all = 0, before = 0;
    std::vector<int64_t> often(blocks_k, p.listed ? 0 : 1), begins{0};
    for (int64_t i = list * blocks_q; p.listed && i < (list + 1) * blocks_q; ++i)
      for (int64_t j = 0; j < p.counts[i]; ++j) ++often[p.listed[i * p.most + j]];
    for (int64_t one : often) all += one;
    for (int64_t block = 0; block < blocks_k; before += often[block++])
      while ((int64_t)begins.size() < count && before * count > all * (int64_t)begins.size())
        begins.push_back(block * p.block_k);
    begins.push_back(p.keys);
    return begins;
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

// Sums in fp32 of what the keys of one key-value head get: the gradients themselves where their rows are whole vectors.
struct Sums {
  const Problem& p;
  int64_t width = pieces(p.width, 16) * 16, value = pieces(p.value, 16) * 16;
  bool direct = !p.half && p.width == width && p.value == value;
  int64_t bytes = direct ? 0 : p.keys * (width + value) * sizeof(float);

  float* of_k(int64_t group, char* room) const {
    return direct ? (float*)p.grad_k.data + group * p.keys * width : (float*)room;
  }
  float* of_v(int64_t group, char* room) const {
    return direct ? (float*)p.grad_v.data + group * p.keys * value : (float*)room + p.keys * width;
  }
  // what every query gives to the keys from one to another, and its own gradient too where `own`
  void fill(const Together& all, const Kernels& kernels, int64_t group, int64_t from, int64_t to, bool own, char* room,
            int32_t* keys, char* scratch) const {
    int64_t b = group / p.groups, g = group % p.groups, list = b * p.shared + g * p.shared / p.groups;
    float *grad_k = of_k(group, room), *grad_v = of_v(group, room);
    std::fill(grad_k + from * width, grad_k + to * width, 0.0f);
    std::fill(grad_v + from * value, grad_v + to * value, 0.0f);
    for (int64_t t = 0; t < p.queries; ++t) {
      int32_t* last = keys + all.name(list, t, keys);
      int32_t *first = std::lower_bound(keys, last, (int32_t)from), *stop = std::lower_bound(first, last, (int32_t)to);
      if (first == stop && !own) continue;
      all.each_tile(g, [&](int64_t head, int64_t heads) {
        kernels.together_back(p, b, head, heads, t, first, stop - first, own, grad_k, grad_v, scratch);
      });
    }
    kernels.store(p, grad_k + from * width, width, p.grad_k, b, g, from, to - from, p.width, p.scale);
    kernels.store(p, grad_v + from * value, value, p.grad_v, b, g, from, to - from, p.value, 1.0f);
  }
};

// Key-value heads apart: all gradients in one sweep, 5 products a tile.
void back_by_group(const Problem& p, const Kernels& kernels) {
  Together all{p};
  Sums sums{p};
  int64_t room = kernels.room_together(p), named = pieces(all.most, 16) * 64;
  shared_out(p.batch * p.groups, room + named + sums.bytes, [&](int64_t i, char* scratch) {
    sums.fill(all, kernels, i, 0, p.keys, true, scratch + room + named, (int32_t*)(scratch + room), scratch);
  });
}

// Queries apart, and then stretches of keys, 7 products a tile.
void back_by_row(const Problem& p, const Kernels& kernels) {
  Together all{p};
  Sums sums{p};
  int64_t room = kernels.room_together(p), named = pieces(all.most, 16) * 64;
  shared_out(p.batch * p.groups * p.queries, room + named, [&](int64_t i, char* scratch) {
    int64_t t = p.queries - 1 - i % p.queries, group = i / p.queries, b = group / p.groups, g = group % p.groups;
    int32_t* keys = (int32_t*)(scratch + room);
    int64_t count = all.name(b * p.shared + g * p.shared / p.groups, t, keys);
    all.each_tile(g, [&](int64_t head, int64_t heads) {
      kernels.together_back(p, b, head, heads, t, keys, count, true, nullptr, nullptr, scratch);
    });
  });
  Tensor memory = at::empty({sums.bytes}, at::kByte);
  for (int64_t i = 0; i < p.batch * p.groups; ++i) {
    int64_t list = i / p.groups * p.shared + i % p.groups * p.shared / p.groups;
    std::vector<int64_t> begins = all.stretches(list, at::get_num_threads());
    shared_out((int64_t)begins.size() - 1, room + named, [&](int64_t n, char* scratch) {
      sums.fill(all, kernels, i, begins[n], begins[n + 1], false, (char*)memory.data_ptr(), (int32_t*)(scratch + room),
                scratch);
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

void backward_together(const Problem& p, const Kernels& kernels, bool by_group) {
  by_group ? back_by_group(p, kernels) : back_by_row(p, kernels);
}

}  // namespace dsv3
