// What one call computes, as plain numbers and addresses: the only thing that the operators and the passes share. As in
// attention's kernels, no class of torch's or of the standard library may be named here.
#pragma once

#include <cstdint>

namespace dsv3::experts {

// Pairs of a token and an expert are sorted by expert; those of expert e are the rows start[e] to start[e + 1]. All
// matrices lie row by row without gaps, in the call's format unless said otherwise; D and F are whole vectors.
struct Problem {
  int64_t experts, hidden, inner;  // E D F
  bool half;                       // bf16 instead of fp32
  const int64_t* start;            // [E + 1]
  const int64_t* token;            // [M]
  const float* weight;             // [M]
  const char *x, *gate_up, *down;  // [N, D] [E, D, 2F] [E, F, D]
  char *h, *a;                     // [M, 2F] pre-activations, [M, F] activations times weights
  float* y;                        // [N, D] fp32
  // backward
  const char* dy;         // [N, D]
  char* dh;               // [M, 2F]
  float *dx, *dweight;    // [N, D] fp32, [M]
  char *dgate_up, *ddown;
  int64_t longest;  // rows of the busiest expert
};

struct Rooms {  // bytes of scratch memory that each pass uses
  int64_t hidden, out, weights, inputs;
};

// Each pass writes what no other piece of its work does, in an order of its own alone, so that the number of threads
// changes no bit. `scratch` has as many bytes as `rooms` says.
struct Kernels {
  const char* name;
  Rooms (*rooms)(const Problem&, int64_t columns);  // columns at a time, where some are taken
  // h and a of an expert's rows
  void (*hidden)(const Problem&, int64_t expert, char* scratch);
  // some columns of y, over all experts
  void (*out)(const Problem&, int64_t column, int64_t columns, char* scratch);
  // dh, dweight, ddown and dgate_up of an expert
  void (*weights)(const Problem&, int64_t expert, char* scratch);
  // some columns of dx, over all experts
  void (*inputs)(const Problem&, int64_t column, int64_t columns, char* scratch);
};

extern const Kernels portable, avx2, avx512, avx512_bf16, amx_bf16;

}  // namespace dsv3::experts
