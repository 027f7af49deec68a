// Sums of squares of channels whose positions lie side by side, as a convolution's do in torch's usual memory format.
// Threads share the planes of all images and read them from end to end.

#include <cstring>
#include <vector>

#include "common.h"
#include "rounded.h"

namespace {

constexpr int64_t kBlock = 2048;     // elements summed in float32 before they enter the float64 totals
constexpr int64_t kAlone = 1 << 14;  // elements below which one thread is faster than two

// As wide as a register: compilers keep what is wider in memory.
#if defined(__AVX512F__)
constexpr int64_t kWidth = 16;
#elif defined(__AVX__)
constexpr int64_t kWidth = 8;
#else
constexpr int64_t kWidth = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Words __attribute__((vector_size(4 * kWidth)));
typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));

inline Floats floats_at(const float* x) {
  Floats found;
  std::memcpy(&found, x, sizeof found);
  return found;
}
inline Floats floats_at(const uint16_t* x) {
  Halves halves;
  std::memcpy(&halves, x, sizeof halves);
  const Words words = __builtin_convertvector(halves, Words) << 16;
  Floats found;
  std::memcpy(&found, &words, sizeof found);
  return found;
}

// Adds the squares of a plane to kWidth totals, whose sum is the plane's.
template <typename Number>
void add_plane(const Number* x, int64_t count, double* totals) {
  for (int64_t i = 0; i < count;) {
    const int64_t last = std::min(count, i + kBlock);
    Floats a = {0}, b = {0}, c = {0}, d = {0};
    for (; i + 4 * kWidth <= last; i += 4 * kWidth) {
      const Floats p = floats_at(x + i), q = floats_at(x + i + kWidth);
      const Floats r = floats_at(x + i + 2 * kWidth), s = floats_at(x + i + 3 * kWidth);
      a += p * p, b += q * q, c += r * r, d += s * s;
    }
    for (; i + kWidth <= last; i += kWidth) {
      const Floats p = floats_at(x + i);
      a += p * p;
    }
    const Floats sums = (a + b) + (c + d);
    for (int64_t lane = 0; lane < kWidth; ++lane) totals[lane] += sums[lane];
    for (; i < last; ++i) {
      const float one = value(x[i]);
      totals[last - i - 1] += one * one;
    }
  }
}

template <typename Number>
void channel_square_sum(const Number* x, int64_t images, int64_t channels, int64_t positions, float* squares,
                        int threads) {
  const int64_t planes = images * channels, width = channels * kWidth;
  const int size = planes * positions < kAlone ? 1 : threads;
  std::vector<double> totals(static_cast<size_t>(width) * size);
#pragma omp parallel num_threads(size)
  {
    const int part = omp_get_thread_num();
    const Range own = share(planes, part, omp_get_num_threads(), 1);
    double* mine = totals.data() + static_cast<size_t>(width) * part;
    int64_t channel = channels == 0 ? 0 : own.begin % channels;
    for (int64_t plane = own.begin; plane < own.end; ++plane) {
      add_plane(x + plane * positions, positions, mine + channel * kWidth);
      if (++channel == channels) channel = 0;
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0.0;
    for (int part = 0; part < size; ++part)
      for (int64_t lane = 0; lane < kWidth; ++lane) sum += totals[part * width + c * kWidth + lane];
    squares[c] = static_cast<float>(sum);
  }
}

}  // namespace

extern "C" {

// squares_c = the sum over images and positions of x_icp^2, of float32 numbers, or bfloat16 if `rounded`
void neurms_channel_square_sum(const void* x, int rounded, int64_t images, int64_t channels, int64_t positions,
                               float* squares, int threads) {
  if (rounded) channel_square_sum(static_cast<const uint16_t*>(x), images, channels, positions, squares, threads);
  else channel_square_sum(static_cast<const float*>(x), images, channels, positions, squares, threads);
}

}  // extern "C"
