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
#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

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

// The same in float64, of half as many numbers.
constexpr int64_t kDoubles = kLanes / 2;
typedef double Wide __attribute__((vector_size(4 * kLanes)));
typedef double UnalignedWide __attribute__((vector_size(4 * kLanes), aligned(8), may_alias));
typedef float Half __attribute__((vector_size(2 * kLanes), aligned(4), may_alias));

inline Wide load_wide(const float* x) {
  // Of the general form g++ 12 makes five instructions, some of which go through memory.
#if defined(__AVX512F__)
  return _mm512_cvtps_pd(_mm256_loadu_ps(x));
#elif defined(__AVX__)
  return _mm256_cvtps_pd(_mm_loadu_ps(x));
#elif defined(__SSE2__)
  return _mm_cvtps_pd(_mm_castpd_ps(_mm_load_sd(reinterpret_cast<const double*>(x))));
#else
  return __builtin_convertvector(*reinterpret_cast<const Half*>(x), Wide);
#endif
}

inline Wide load(const double* x) { return *reinterpret_cast<const UnalignedWide*>(x); }
inline void store(double* x, const Wide& lanes) { *reinterpret_cast<UnalignedWide*>(x) = lanes; }

inline double total(const Lanes& lanes) {
  double sum = 0;
  for (int64_t l = 0; l < kLanes; ++l) sum += lanes[l];
  return sum;
}

inline double total(const Wide& lanes) {
  double sum = 0;
  for (int64_t l = 0; l < kDoubles; ++l) sum += lanes[l];
  return sum;
}

// Fetches the next kCount rows, which begin at `next`, while others are walked over side by side: at column j the part
// whose turn it is, in the order of memory. The hardware does not follow several rows from page to page.
template <int kCount>
inline void fetch_rows(const float* next, int64_t j) {
  if (kLanes < kLine && j % kLine) return;
  for (int r = 0; r < kCount; ++r) __builtin_prefetch(next + kCount * j + kLine * r);
}

struct Range {
  int64_t begin, end;
};

inline Range share(int64_t count, int part, int parts, int64_t multiple) {
  const int64_t blocks = (count + multiple - 1) / multiple;
  const int64_t first = blocks * part / parts, last = blocks * (part + 1) / parts;
  return {std::min(first * multiple, count), std::min(last * multiple, count)};
}

}  // namespace
