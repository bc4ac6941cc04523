// What one call computes, as plain numbers and addresses: the only thing that the operators and the kernels share.
// No class of torch's or of the standard library may be named here: a kernel is compiled for instructions that the
// processor may lack, and an inline function compiled beside it could replace the one that everybody else calls.
#pragma once

#include <cstdint>

namespace dsv3 {

constexpr int64_t SPAN = 4;   // tiles that a single query is multiplied with at a time
constexpr int64_t TILE = 64;  // queries and keys that are multiplied at a time: 64 x 64 scores are half an L1 cache
constexpr int64_t MANY_HEADS = 8;  // from which on one query of each is a tile

// A tensor [batch, head, row, width] whose rows lie in one piece each; strides count elements.
struct Rows {
  char* data;
  int64_t batch, head, row;
};

struct Problem {
  int64_t batch, heads, groups, queries, keys, width, value;  // B H G T S P R
  int64_t block_q, block_k;
  bool half;  // bf16 instead of fp32
  float scale;
  Rows q, k, v, out, grad_out, grad_q, grad_k, grad_v;
  float* lse;    // [B, H, T] the logarithm of each row's softmax denominator
  float* delta;  // [B, H, T] each row's grad_out . out
  // the selection: blocks of keys per block of queries, sorted, causal; nullptr: all causal blocks
  int64_t shared;         // h of the selection: 1, G or H
  const int32_t* listed;  // [B, h, Nq, K]
  const int32_t* counts;  // [B, h, Nq]
  int64_t most;           // K
  // its inverse: blocks of queries per block of keys; not where many heads share keys and a list
  const int64_t* inverse_start;  // [B * h * Nk + 1]
  const int32_t* inverse;
  const int32_t* inverse_place;  // where in their lists it stands; only with a bias
  const float* weights;  // [B, h, S] or nullptr
  const int32_t* rank;   // [B, h, S] and
  const int32_t* limit;  // [B, h, T], or nullptr both
  float* grad_weights;   // [B, H, S], one row per query head, or nullptr
  const float* bias;     // [B, h, Nq, K] of the listed blocks, or nullptr
  float* grad_bias;      // [B, H, Nq, K, parts], or nullptr
  int64_t parts;         // those who add to the gradient of a bias: tiles of its block of keys, or queries of its block
};

// The passes over one piece of work. Each writes what no other piece does, in an order of its own alone, so that the
// number of threads changes no bit.
struct Kernels {
  const char* name;
  int64_t (*room)(const Problem&);  // bytes of scratch memory that any of the passes may use, a multiple of 64
  // out and lse of up to TILE queries
  void (*forward)(const Problem&, int64_t b, int64_t h, int64_t first, int64_t rows, char* scratch);
  // delta of up to TILE queries
  void (*delta)(const Problem&, int64_t b, int64_t h, int64_t first, int64_t rows);
  // grad_k, grad_v of up to TILE keys; where grad_q is given, their part of it is added to the rows of [H/G, T, stride]
  void (*key_tile)(const Problem&, int64_t b, int64_t g, int64_t first, int64_t count, float* grad_q, int64_t stride,
                   char* scratch);
  // grad_q of up to TILE queries, unscaled, into rows of fp32
  void (*query_tile)(const Problem&, int64_t b, int64_t h, int64_t first, int64_t rows, float* grad_q, int64_t stride,
                     char* scratch);
  // scale rows of fp32 and store them in the call's format
  void (*store)(const Problem&, const float* from, int64_t stride, const Rows& to, int64_t b, int64_t h, int64_t first,
                int64_t rows, int64_t width, float factor);
  // a single query against the SPAN tiles of its list from number * SPAN on: values, padded to vectors, and 2 more
  void (*span)(const Problem&, int64_t b, int64_t h, int64_t number, float* to);
  // a query in up to TILE heads of a group against up to SPAN tiles of keys by their numbers, each head's as a span
  void (*together)(const Problem&, int64_t b, int64_t head, int64_t heads, int64_t t, const int32_t* number,
                   int64_t count, float* to, int64_t stride, char* scratch);
  // of such a query grad_q, where `own`; where sums are given, its part of grad_k and grad_v is added to those rows of
  // whole vectors, and that of the gradient of weights
  void (*together_back)(const Problem&, int64_t b, int64_t head, int64_t heads, int64_t t, const int32_t* number,
                        int64_t count, bool own, float* grad_k, float* grad_v, char* scratch);
  int64_t (*room_together)(const Problem&);  // bytes of scratch memory for either
  // out and lse of a query from its spans, which begin `stride` numbers apart
  void (*join)(const Problem&, int64_t b, int64_t h, int64_t t, float* spans, int64_t stride, int64_t count);
  // query . row, for the numbers of rows of fp32 that lie behind each other; the query is padded to whole vectors
  void (*scores)(const float* query, const float* rows, int64_t width, const int32_t* number, int64_t count, float* to);
  // the places of the `most` best of the scores, ascending; key, place: memory for `count` numbers and a vector
  int64_t (*best)(const float* score, int64_t count, int64_t most, int32_t* key, int32_t* place);
  // out and lse of one query among many
  void (*forward_one)(const Problem&, int64_t b, int64_t h, int64_t t);
  // grad_q of one query; where sums are given, its part of grad_k and grad_v is added to those rows of whole vectors
  void (*backward_one)(const Problem&, int64_t b, int64_t h, int64_t t, float* grad_k, float* grad_v);
  // grad_k and grad_v of one key
  void (*key_one)(const Problem&, int64_t b, int64_t g, int64_t j);
};

extern const Kernels portable, avx2, avx512, avx512_bf16, amx_bf16;

}  // namespace dsv3
