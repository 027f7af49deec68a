// What the native kernels share. Plain C interfaces, contiguous row-major float32, no torch headers, so that a
// build takes a second. The eager definitions of neurms/compiled are the specification.
//
// Floating point: no -ffast-math (it would flush denormals in the whole process, for everybody);
// `omp simd reduction` is what allows sums to be vectorised.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include <omp.h>

#include "kernels.h"

namespace {

constexpr int64_t kLine = 16;  // floats in a cache line
constexpr float kTiny = 1.17549435e-38f;

// As many floats as a register of this processor holds. Of vectors that are wider g++ 12 makes code that goes through
// memory and takes 30 times as long.
#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif

// Kept in registers where it is spelled out: `omp simd` keeps arrays of sums in memory.
typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef float Unaligned __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Lanes load(const float* x) { return *reinterpret_cast<const Unaligned*>(x); }
inline void store(float* x, const Lanes& lanes) { *reinterpret_cast<Unaligned*>(x) = lanes; }

struct Range {
  int64_t begin, end;
};

inline Range share(int64_t count, int part, int parts, int64_t multiple) {
  const int64_t blocks = (count + multiple - 1) / multiple;
  const int64_t first = blocks * part / parts, last = blocks * (part + 1) / parts;
  return {std::min(first * multiple, count), std::min(last * multiple, count)};
}

}  // namespace
