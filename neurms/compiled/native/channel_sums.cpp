// Sums of squares of channels whose positions lie side by side, as a convolution's do in torch's usual memory format.
// Threads share the planes of all images and read them from end to end.

#include <cstring>
#include <vector>

#include "common.h"
#include "rounded.h"

namespace {

constexpr int64_t kBlock = 2048;     // elements summed in float32, a line's numbers apart, before they enter float64
constexpr int64_t kAlone = 1 << 14;  // elements below which one thread is faster than two

typedef uint16_t Halves __attribute__((vector_size(2 * kLine)));
typedef uint32_t Words __attribute__((vector_size(4 * kLine)));

inline Lanes widened(const Halves& halves) {
  const Words words = __builtin_convertvector(halves, Words) << 16;
  Lanes lanes;
  std::memcpy(&lanes, &words, sizeof lanes);
  return lanes;
}

inline Lanes lanes_at(const float* x) { return load(x); }
inline Lanes lanes_at(const uint16_t* x) {
  Halves halves;
  std::memcpy(&halves, x, sizeof halves);
  return widened(halves);
}

// The `count` numbers, fewer than a line, with zeros behind them.
template <typename Number>
Lanes part_at(const Number* x, int64_t count) {
  Number padded[kLine] = {0};
  for (int64_t i = 0; i < count; ++i) padded[i] = x[i];
  return lanes_at(padded);
}

// Adds the squares of a plane to a line of totals; whoever has all of them adds up the line.
template <typename Number>
void add_plane(const Number* x, int64_t count, double* totals) {
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t last = std::min(count, first + kBlock);
    Lanes a = {0}, b = {0}, c = {0}, d = {0};
    int64_t i = first;
    for (; i + 4 * kLine <= last; i += 4 * kLine) {
      const Lanes p = lanes_at(x + i), q = lanes_at(x + i + kLine);
      const Lanes r = lanes_at(x + i + 2 * kLine), s = lanes_at(x + i + 3 * kLine);
      a += p * p, b += q * q, c += r * r, d += s * s;
    }
    for (; i + kLine <= last; i += kLine) {
      const Lanes p = lanes_at(x + i);
      a += p * p;
    }
    if (i < last) {
      const Lanes p = part_at(x + i, last - i);
      b += p * p;
    }
    const Lanes sums = (a + b) + (c + d);
    for (int64_t lane = 0; lane < kLine; ++lane) totals[lane] += sums[lane];
  }
}

template <typename Number>
void channel_square_sum(const Number* x, int64_t images, int64_t channels, int64_t positions, float* squares,
                        int threads) {
  const int64_t planes = images * channels, width = channels * kLine;
  const int size = planes * positions < kAlone ? 1 : threads;
  std::vector<double> totals(static_cast<size_t>(width) * size);
#pragma omp parallel num_threads(size)
  {
    const int part = omp_get_thread_num();
    const Range own = share(planes, part, omp_get_num_threads(), 1);
    double* mine = totals.data() + static_cast<size_t>(width) * part;
    int64_t channel = own.begin % channels;
    for (int64_t plane = own.begin; plane < own.end; ++plane) {
      add_plane(x + plane * positions, positions, mine + channel * kLine);
      if (++channel == channels) channel = 0;
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0.0;
    for (int part = 0; part < size; ++part)
      for (int64_t lane = 0; lane < kLine; ++lane) sum += totals[part * width + c * kLine + lane];
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
