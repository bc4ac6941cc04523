// torch.ops.dsv3_kernels: block-sparse attention on a CPU, forward and backward, over the passes of one instruction set.
//
// The lists of a selection are sorted, rid of repeats and of blocks in the future, and checked; backward inverts them,
// unless many heads share one. Work is taken tile by tile by whichever thread is free: a tile's result depends on its
// inputs alone.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "key_sums.h"
#include "problem.h"
#include "work.h"

namespace dsv3 {

bool shared_by_many(const Problem& p);  // of together.cpp, as the next two
void forward_together(const Problem& p, const Kernels& kernels);
void backward_together(const Problem& p, const Kernels& kernels, bool by_head);

namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

std::initializer_list<const Kernels*> every() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  static const std::initializer_list<const Kernels*> all = {&amx_bf16, &avx512_bf16, &avx512, &avx2, &portable};
#else
  static const std::initializer_list<const Kernels*> all = {&portable};
#endif
  return all;
}

}  // namespace

const Kernels& chosen(const std::string& instructions) { return among(every(), instructions); }

namespace {

std::string names() { return names_of(every()); }

Rows rows_of(const Tensor& x) { return {(char*)x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

// Rows in one piece each; other strides may be anything, as projections leave them.
Tensor in_rows(const Tensor& x) { return x.stride(3) == 1 || x.size(3) == 1 ? x : x.contiguous(); }

// The tensors behind a Problem's addresses, kept while it is computed.
struct Call {
  Problem p{};
  std::vector<Tensor> kept;

  Tensor keep(Tensor x) {
    kept.push_back(x);
    return x;
  }
};

void check(const Tensor& q, const Tensor& k, const Tensor& v, int64_t block_q, int64_t block_k) {
  TORCH_CHECK_VALUE(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k, v: must be [batch, heads, positions, width]");
  auto type = q.scalar_type();
  TORCH_CHECK_VALUE(type == k.scalar_type() && type == v.scalar_type(), "dtypes: must be one");
  TORCH_CHECK_VALUE(type == at::kFloat || type == at::kBFloat16, "dtype=", type, ": must be float32 or bfloat16");
  TORCH_CHECK_VALUE(q.numel() && k.numel() && v.numel(), "q, k, v: must not be empty");
  bool fits = q.size(0) == k.size(0) && q.size(3) == k.size(3) && q.size(2) <= k.size(2) && q.size(1) % k.size(1) == 0;
  bool alike = k.size(0) == v.size(0) && k.size(1) == v.size(1) && k.size(2) == v.size(2);
  TORCH_CHECK_VALUE(fits && alike, "q, k, v: must be [B,H,T,P], [B,G,S,P] and [B,G,S,R] with T <= S and G dividing H");
  TORCH_CHECK_VALUE(block_q > 0 && block_k > 0, "blocks: must hold a token");
  TORCH_CHECK_VALUE(k.size(2) < (int64_t(1) << 31), "positions=", k.size(2), ": must be below 2^31");
}

void check_shape(const Problem& p, const Tensor& given, const char* name, int64_t length) {
  bool fits = given.dim() == 3 && given.size(0) == p.batch && given.size(1) == p.shared && given.size(2) == length;
  TORCH_CHECK_VALUE(fits, name, ": must be [", p.batch, ", ", p.shared, ", ", length, "]");
}

Tensor integers(const Tensor& given, const char* name) {
  TORCH_CHECK_VALUE(at::isIntegralType(given.scalar_type(), false), name, ": must be integers");
  return given.to(at::kLong).contiguous();
}

// The rule per token in 32 bits. Ranks have to fit; a limit beyond them says the same at the end of their range.
void read_rule(Call& call, const Tensor& rank, const Tensor& limit) {
  Problem& p = call.p;
  constexpr int64_t END = std::numeric_limits<int32_t>::max();
  check_shape(p, rank, "rank", p.keys);
  check_shape(p, limit, "limit", p.queries);
  Tensor wide[] = {integers(rank, "rank"), integers(limit, "limit")};
  const int32_t* narrow[2];
  for (int i = 0; i < 2; ++i) {
    const int64_t* from = wide[i].data_ptr<int64_t>();
    int32_t* to = call.keep(at::empty({wide[i].numel()}, at::kInt)).data_ptr<int32_t>();
    for (int64_t j = 0; j < wide[i].numel(); ++j) {
      TORCH_CHECK_VALUE(i || (-END <= from[j] && from[j] <= END), "rank=", from[j], ": must be within +-", END);
      to[j] = std::clamp(from[j], -END - 1, END);
    }
    narrow[i] = to;
  }
  p.rank = narrow[0], p.limit = narrow[1];
}

// Sort the listed blocks, and drop repeats and what lies in the future of the whole block of queries.
void read_lists(Call& call, const Tensor& indices, const Tensor& counts) {
  Problem& p = call.p;
  int64_t blocks_q = pieces(p.queries, p.block_q), blocks_k = pieces(p.keys, p.block_k);
  bool fits = indices.dim() == 4 && counts.dim() == 3 && indices.size(0) == p.batch && indices.size(2) == blocks_q &&
              indices.sizes().slice(0, 3) == counts.sizes();
  TORCH_CHECK_VALUE(fits, "indices, counts: must be [B, h, ", blocks_q, ", K] and [B, h, ", blocks_q, "]");
  p.shared = indices.size(1), p.most = indices.size(3);
  TORCH_CHECK_VALUE(p.shared == 1 || p.shared == p.groups || p.shared == p.heads, "indices: h must be 1, G or H");
  Tensor given = integers(indices, "indices"), numbers = integers(counts, "counts");
  const int64_t *wide = given.data_ptr<int64_t>(), *many = numbers.data_ptr<int64_t>();
  // copies of our own: they are sorted in place; never of nothing, whose address would say that there is no selection
  Tensor lists = call.keep(at::empty({std::max<int64_t>(given.numel(), 1)}, at::kInt));
  Tensor lengths = call.keep(at::empty({numbers.numel()}, at::kInt));
  int32_t *list = lists.data_ptr<int32_t>(), *length = lengths.data_ptr<int32_t>();
  at::parallel_for(0, p.batch * p.shared * blocks_q, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      TORCH_CHECK_VALUE(many[i] >= 0 && many[i] <= p.most, "counts: must be between 0 and K=", p.most);
      int32_t *one = list + i * p.most, *stop = one + many[i];
      for (int64_t j = 0; j < many[i]; ++j) {
        int64_t block = wide[i * p.most + j];
        TORCH_CHECK_VALUE(0 <= block && block < blocks_k, "indices: must be between 0 and ", blocks_k - 1,
                          ", the last of the blocks of keys");
        one[j] = block;
      }
      std::sort(one, stop);
      int64_t newest = p.keys - p.queries + std::min((i % blocks_q + 1) * p.block_q, p.queries) - 1;
      stop = std::upper_bound(one, std::unique(one, stop), (int32_t)(newest / p.block_k));
      length[i] = stop - one;
    }
  });
  p.listed = list, p.counts = length;
}

// A number for each listed block: the lists have to stand as they are given.
void read_bias(Call& call, const Tensor& bias, const Tensor& indices, const Tensor& counts) {
  Problem& p = call.p;
  TORCH_CHECK_VALUE(bias.sizes() == indices.sizes(), "bias: must be ", indices.sizes(), ", as indices are");
  Tensor given = integers(indices, "indices"), numbers = integers(counts, "counts");
  for (int64_t i = 0; i < numbers.numel(); ++i) {
    const int64_t *one = given.data_ptr<int64_t>() + i * p.most, *stop = one + p.counts[i];
    bool stands = p.counts[i] == numbers.data_ptr<int64_t>()[i] && std::equal(one, stop, p.listed + i * p.most);
    TORCH_CHECK_VALUE(stands, "indices: with a bias must be ascending, each block once, and none in the future");
  }
  p.bias = call.keep(bias.to(at::kFloat).contiguous()).data_ptr<float>();
}

Call prepared(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& indices, const Optional& counts,
              int64_t block_q, int64_t block_k, double scale, const Optional& weights, const Optional& rank,
              const Optional& limit, const Optional& bias) {
  check(q, k, v, block_q, block_k);
  Call call;
  Problem& p = call.p;
  p.batch = q.size(0), p.heads = q.size(1), p.groups = k.size(1), p.queries = q.size(2), p.keys = k.size(2);
  p.width = q.size(3), p.value = v.size(3), p.block_q = block_q, p.block_k = block_k;
  p.half = q.scalar_type() == at::kBFloat16, p.scale = scale, p.shared = 1;
  p.q = rows_of(call.keep(in_rows(q))), p.k = rows_of(call.keep(in_rows(k))), p.v = rows_of(call.keep(in_rows(v)));
  TORCH_CHECK_VALUE(indices.has_value() == counts.has_value(), "indices, counts: give both or neither");
  TORCH_CHECK_VALUE(rank.has_value() == limit.has_value(), "rank, limit: give both or neither");
  TORCH_CHECK_VALUE(indices.has_value() || !bias.has_value(), "bias: belongs to listed blocks");
  if (indices) read_lists(call, *indices, *counts);
  if (bias) read_bias(call, *bias, *indices, *counts);
  if (rank) read_rule(call, *rank, *limit);
  if (weights) {
    check_shape(p, *weights, "weights", p.keys);
    p.weights = call.keep(weights->to(at::kFloat).contiguous()).data_ptr<float>();
  }
  return call;
}

// A tile of queries: never more than a block, so that one list holds for all of it.
struct Tiles {
  int64_t block, per_block, count;
  explicit Tiles(int64_t length, int64_t size)
      : block(size), per_block(pieces(size, TILE)), count(pieces(length, size) * per_block) {}
  // false: the block ends before
  bool piece(int64_t i, int64_t length, int64_t* first, int64_t* rows) const {
    int64_t start = i / per_block * block;
    *first = start + i % per_block * TILE;
    *rows = std::min(std::min(start + block, length) - *first, TILE);
    return *rows > 0;
  }
};

// Whether tiles would be mostly empty: each query has a list of its own, or few share one of short blocks.
bool one_by_one(const Problem& p) {
  int64_t together = std::min(p.block_q, p.queries);
  return p.listed && (together == 1 || (together <= 4 && p.block_k < 16));
}

// Rows of every head, some of them at a time, the last first: those see the most.
template <class Work>
void each_row(int64_t heads, int64_t length, const Work& work) {
  int64_t count = pieces(length, TILE);
  shared_out(heads * count, 0, [&](int64_t i, char*) {
    int64_t first = (count - 1 - i % count) * TILE;
    for (int64_t row = first; row < std::min(first + TILE, length); ++row) work(i / count, row);
  });
}

// A single query in every sequence and head, as in decoding: span by span, so that threads outnumber heads.
void forward_of_one(const Problem& p, const Kernels& kernels) {
  int64_t size = p.listed ? p.block_k : TILE, blocks = p.listed ? p.most : pieces(p.keys, size);
  int64_t count = std::max<int64_t>(pieces(blocks * pieces(size, TILE), SPAN), 1);
  int64_t heads = p.batch * p.heads, stride = (p.value + 15) / 16 * 16 + 16;
  Tensor spans = at::empty({heads * count * stride}, at::kFloat);
  float* parts = spans.data_ptr<float>();
  shared_out(heads * count, 0, [&](int64_t i, char*) {
    kernels.span(p, i / count / p.heads, i / count % p.heads, i % count, parts + i * stride);
  });
  for (int64_t i = 0; i < heads; ++i)
    kernels.join(p, i / p.heads, i % p.heads, 0, parts + i * count * stride, stride, count);
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& indices,
                                   const Optional& counts, int64_t block_q, int64_t block_k, double scale,
                                   const Optional& weights, const Optional& rank, const Optional& limit,
                                   const Optional& bias, std::string_view instructions) {
  const Kernels& kernels = chosen(std::string(instructions));
  Call call = prepared(q, k, v, indices, counts, block_q, block_k, scale, weights, rank, limit, bias);
  Problem& p = call.p;
  Tensor out = at::empty({p.batch, p.heads, p.queries, p.value}, q.options());
  Tensor lse = at::empty({p.batch, p.heads, p.queries}, q.options().dtype(at::kFloat));
  p.out = rows_of(out), p.lse = lse.data_ptr<float>();
  if (shared_by_many(p)) {
    forward_together(p, kernels);
    return {out, lse};
  }
  if (p.queries == 1 && !p.rank && !p.bias && (!p.listed || p.block_k >= 16)) {
    forward_of_one(p, kernels);
    return {out, lse};
  }
  if (one_by_one(p)) {
    each_row(p.batch * p.heads, p.queries,
             [&](int64_t head, int64_t t) { kernels.forward_one(p, head / p.heads, head % p.heads, t); });
    return {out, lse};
  }
  Tiles tiles(p.queries, p.block_q);
  shared_out(p.batch * p.heads * tiles.count, kernels.room(p), [&](int64_t i, char* scratch) {
    int64_t first, rows, head = i / tiles.count;
    // the last queries first: without a selection they see the most, and the longest piece should not come last
    if (tiles.piece(tiles.count - 1 - i % tiles.count, p.queries, &first, &rows))
      kernels.forward(p, head / p.heads, head % p.heads, first, rows, scratch);
  });
  return {out, lse};
}

// For each block of keys the blocks of queries that list it, in ascending order.
void invert(Call& call) {
  Problem& p = call.p;
  int64_t blocks_q = pieces(p.queries, p.block_q), blocks_k = pieces(p.keys, p.block_k);
  int64_t lists = p.batch * p.shared;
  int64_t* start = call.keep(at::zeros({lists * blocks_k + 1}, at::kLong)).data_ptr<int64_t>();
  auto each = [&](auto&& act) {
    for (int64_t i = 0; i < lists * blocks_q; ++i)
      for (int64_t j = 0; j < p.counts[i]; ++j)
        act(i / blocks_q * blocks_k + p.listed[i * p.most + j], int32_t(i % blocks_q), int32_t(j));
  };
  each([&](int64_t key, int32_t, int32_t) { ++start[key + 1]; });
  for (int64_t i = 0; i < lists * blocks_k; ++i) start[i + 1] += start[i];
  int32_t* blocks = call.keep(at::empty({start[lists * blocks_k]}, at::kInt)).data_ptr<int32_t>();
  Tensor next = at::empty({lists * blocks_k}, at::kLong);
  int64_t* filled = next.data_ptr<int64_t>();
  std::copy_n(start, lists * blocks_k, filled);
  int64_t named = p.bias ? start[lists * blocks_k] : 0;
  int32_t* places = call.keep(at::empty({named}, at::kInt)).data_ptr<int32_t>();
  each([&](int64_t key, int32_t block, int32_t place) {
    if (named) places[filled[key]] = place;
    blocks[filled[key]++] = block;
  });
  p.inverse_start = start, p.inverse = blocks, p.inverse_place = places;
}

// grad_q of one head, from rows of fp32.
void store_queries(const Problem& p, const Kernels& kernels, const float* from, int64_t stride, int64_t b, int64_t h) {
  kernels.store(p, from, stride, p.grad_q, b, h, 0, p.queries, p.width, p.scale);
}

// Heads apart: a thread sweeps all keys of a key-value head and adds up grad_q on the way, 5 products a pair of tiles.
void backward_by_head(const Problem& p, const Kernels& kernels) {
  int64_t group = p.heads / p.groups, stride = (p.width + 15) / 16 * 16;
  bool direct = !p.half && p.width == stride;  // grad_q itself holds the sums
  Tiles tiles(p.keys, p.block_k);
  int64_t room = kernels.room(p), sums = direct ? 0 : group * p.queries * stride * sizeof(float);
  shared_out(p.batch * p.groups, room + sums, [&](int64_t i, char* scratch) {
    int64_t b = i / p.groups, g = i % p.groups, first, count;
    float* grad_q = direct ? (float*)p.grad_q.data + (b * p.heads + g * group) * p.queries * stride
                           : (float*)(scratch + room);
    std::fill(grad_q, grad_q + group * p.queries * stride, 0.0f);
    for (int64_t tile = 0; tile < tiles.count; ++tile)
      if (tiles.piece(tile, p.keys, &first, &count)) kernels.key_tile(p, b, g, first, count, grad_q, stride, scratch);
    for (int64_t h = 0; h < group; ++h)
      store_queries(p, kernels, grad_q + h * p.queries * stride, stride, b, g * group + h);
  });
}

// Tiles apart: first grad_q by tiles of queries, then grad_k and grad_v by tiles of keys, 7 products a pair of tiles.
void backward_by_tile(const Problem& p, const Kernels& kernels) {
  Tiles queries(p.queries, p.block_q), keys(p.keys, p.block_k);
  int64_t stride = (p.width + 15) / 16 * 16;
  int64_t room = kernels.room(p);
  shared_out(p.batch * p.heads * queries.count, room + TILE * stride * 4, [&](int64_t i, char* scratch) {
    int64_t head = i / queries.count, b = head / p.heads, h = head % p.heads, first, rows;
    if (!queries.piece(queries.count - 1 - i % queries.count, p.queries, &first, &rows)) return;
    float* grad_q = (float*)(scratch + room);
    std::fill(grad_q, grad_q + rows * stride, 0.0f);
    kernels.query_tile(p, b, h, first, rows, grad_q, stride, scratch);
    kernels.store(p, grad_q, stride, p.grad_q, b, h, first, rows, p.width, p.scale);
  });
  shared_out(p.batch * p.groups * keys.count, room, [&](int64_t i, char* scratch) {
    int64_t head = i / keys.count, first, count;
    if (keys.piece(i % keys.count, p.keys, &first, &count))
      kernels.key_tile(p, head / p.groups, head % p.groups, first, count, nullptr, 0, scratch);
  });
}

// One by one, heads apart: a thread takes all queries of a key-value head and adds up grad_k and grad_v on the way.
void singly_by_head(const Problem& p, const Kernels& kernels) {
  KeySums sums{p};
  shared_out(p.batch * p.groups, sums.bytes, [&](int64_t i, char* room) {
    int64_t b = i / p.groups, g = i % p.groups, group = p.heads / p.groups;
    float *grad_k = sums.of_k(i, room), *grad_v = sums.of_v(i, room);
    sums.clear(i, 0, p.keys, room);
    for (int64_t h = g * group; h < (g + 1) * group; ++h)
      for (int64_t t = 0; t < p.queries; ++t) kernels.backward_one(p, b, h, t, grad_k, grad_v);
    sums.store(kernels, i, 0, p.keys, room);
  });
}

// One by one, rows apart: first grad_q query by query, then grad_k and grad_v key by key.
void singly_by_row(const Problem& p, const Kernels& kernels) {
  each_row(p.batch * p.heads, p.queries, [&](int64_t head, int64_t t) {
    kernels.backward_one(p, head / p.heads, head % p.heads, t, nullptr, nullptr);
  });
  each_row(p.batch * p.groups, p.keys,
           [&](int64_t head, int64_t j) { kernels.key_one(p, head / p.groups, head % p.groups, j); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
    const Optional& indices, const Optional& counts, int64_t block_q, int64_t block_k, double scale,
    const Optional& weights, const Optional& rank, const Optional& limit, const Optional& bias,
    std::string_view instructions) {
  const Kernels& kernels = chosen(std::string(instructions));
  Call call = prepared(q, k, v, indices, counts, block_q, block_k, scale, weights, rank, limit, bias);
  Problem& p = call.p;
  Tensor pull = grad.to(q.scalar_type());
  Tensor grad_q = at::empty(q.sizes(), q.options()), grad_k = at::empty(k.sizes(), k.options());
  Tensor grad_v = at::empty(v.sizes(), v.options()), logs = lse.contiguous();
  Tensor delta = at::empty({p.batch, p.heads, p.queries}, logs.options());
  Tensor grad_w = at::zeros({weights ? p.batch : 0, p.heads, p.keys}, logs.options());
  p.grad_out = rows_of(call.keep(in_rows(pull))), p.out = rows_of(call.keep(in_rows(out)));
  p.grad_q = rows_of(grad_q), p.grad_k = rows_of(grad_k), p.grad_v = rows_of(grad_v);
  p.lse = logs.data_ptr<float>(), p.delta = delta.data_ptr<float>();
  p.grad_weights = weights ? grad_w.data_ptr<float>() : nullptr;
  p.parts = one_by_one(p) ? std::min(p.block_q, p.queries) : pieces(p.block_k, TILE);
  int64_t rows = bias ? pieces(p.queries, p.block_q) : 0;
  Tensor grad_b = at::zeros({bias ? p.batch : 0, p.heads, rows, bias ? p.most : 0, p.parts}, logs.options());
  p.grad_bias = bias ? grad_b.data_ptr<float>() : nullptr;
  bool together = shared_by_many(p);
  if (p.listed && !together) invert(call);
  int64_t pieces_q = pieces(p.queries, TILE);
  shared_out(p.batch * p.heads * pieces_q, 0, [&](int64_t i, char*) {
    int64_t head = i / pieces_q, first = i % pieces_q * TILE;
    kernels.delta(p, head / p.heads, head % p.heads, first, std::min(TILE, p.queries - first));
  });
  // both ways give the same bits; the cheaper one by its number of products
  int64_t threads = at::get_num_threads(), heads = p.batch * p.groups;
  bool by_head = 5 * pieces(heads, threads) * threads <= 7 * heads;
  if (together)
    backward_together(p, kernels, by_head);
  else if (one_by_one(p))
    by_head ? singly_by_head(p, kernels) : singly_by_row(p, kernels);
  else
    by_head ? backward_by_head(p, kernels) : backward_by_tile(p, kernels);
  return {grad_q, grad_k, grad_v, grad_w, bias ? grad_b.sum(-1) : grad_b.select(-1, 0)};
}

}  // namespace
}  // namespace dsv3

TORCH_LIBRARY(dsv3_kernels, m) {
  m.def(
      "forward(Tensor q, Tensor k, Tensor v, Tensor? indices, Tensor? counts, int block_q, int block_k, float scale, "
      "Tensor? weights, Tensor? rank, Tensor? limit, Tensor? bias, str instructions) -> (Tensor, Tensor)");
  m.def(
      "backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? indices, Tensor? counts, "
      "int block_q, int block_k, float scale, Tensor? weights, Tensor? rank, Tensor? limit, Tensor? bias, "
      "str instructions) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("instructions() -> str", dsv3::names);
}

TORCH_LIBRARY_IMPL(dsv3_kernels, CPU, m) {
  m.impl("forward", dsv3::forward);
  m.impl("backward", dsv3::backward);
}
