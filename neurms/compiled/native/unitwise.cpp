// NeuRMS's passes: over D and H, tall matrices whose columns are units or features, and over W. Contiguous
// row-major float32 like the other kernels; the eager definitions in neurms/compiled/{signals,reductions,update,
// finite}.py are the specification. Threads share columns of D and H, so that a column's sum, its factor and its
// scaling stay with one thread and its cache, and no thread waits for another.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include <omp.h>

namespace {

constexpr int64_t kStrip = 256;     // columns taken together: their sums stay in the first-level cache
constexpr int64_t kFlush = 32;      // rows summed in float32 before they enter the float64 totals
constexpr int64_t kAlone = 1 << 14; // elements below which one thread is faster than two

struct Moments {
  double beta, weight, correction, eps, v_min, low, high;
};

// Sums of squares, and of the elements if `sums`, of `width` columns.
template <bool kWithSums>
void column_sums(const float* x, int64_t rows, int64_t stride, int64_t width, float* squares, float* sums) {
  double square_total[kStrip] = {0}, total[kStrip] = {0};
  for (int64_t first = 0; first < rows; first += kFlush) {
    float a[kStrip] = {0}, b[kStrip] = {0};
    const int64_t last = std::min(rows, first + kFlush);
    int64_t i = first;
    for (; i + 4 <= last; i += 4) {
      const float *p = x + i * stride, *q = p + stride, *r = q + stride, *s = r + stride;
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) {
        a[j] += (p[j] * p[j] + q[j] * q[j]) + (r[j] * r[j] + s[j] * s[j]);
        if (kWithSums) b[j] += (p[j] + q[j]) + (r[j] + s[j]);
      }
    }
    for (; i < last; ++i) {
      const float* p = x + i * stride;
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) {
        a[j] += p[j] * p[j];
        if (kWithSums) b[j] += p[j];
      }
    }
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) {
      square_total[j] += a[j];
      if (kWithSums) total[j] += b[j];
    }
  }
  for (int64_t j = 0; j < width; ++j) {
    squares[j] = static_cast<float>(square_total[j]);
    if (kWithSums) sums[j] = static_cast<float>(total[j]);
  }
}

void factors(const float* squares, const float* v, const Moments& m, int64_t width, float* blended, float* out) {
  for (int64_t j = 0; j < width; ++j) {
    // The steps of the eager definition, whose moment is float32 too: it overflows where that does.
    const float sample = static_cast<float>(squares[j] * m.weight);
    const double mixed = v[j] + (1.0 - m.beta) * (static_cast<double>(sample) - v[j]);
    blended[j] = static_cast<float>(mixed);
    const double root = std::max(blended[j] / m.correction + m.eps, m.v_min);
    const double scale = 1.0 / std::sqrt(root);
    // NaN stays NaN: std::max and std::min would hide it.
    const double low = scale < m.low ? m.low : scale;
    const double bounded = low > m.high ? m.high : low;
    out[j] = static_cast<float>(std::isnan(blended[j]) ? static_cast<double>(blended[j]) : bounded);
  }
}

void scale_columns(const float* x, int64_t rows, int64_t stride, int64_t width, const float* s, float* out) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* p = x + i * stride;
    float* q = out + i * stride;
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) q[j] = p[j] * s[j];
  }
}

}  // namespace

extern "C" {

// Whether no magnitude exceeds `bound`, which no NaN is within: floats without their sign are ordered as integers are.
int neurms_all_within(const float* x, int64_t count, float bound, int threads) {
  const uint32_t magnitude = 0x7fffffffu;
  uint32_t greatest, bad = 0;
  std::memcpy(&greatest, &bound, sizeof bound);
#pragma omp parallel for num_threads(count < kAlone ? 1 : threads) schedule(static) reduction(| : bad)
  for (int64_t block = 0; block < count; block += 8192) {
    const int64_t end = std::min(count, block + 8192);
    const uint32_t* bits = reinterpret_cast<const uint32_t*>(x);
    uint32_t peak = 0;
#pragma omp simd reduction(max : peak)
    for (int64_t i = block; i < end; ++i) peak = std::max(peak, bits[i] & magnitude);
    bad |= peak > greatest;
  }
  return !bad;
}

// squares_j = sum_i x_ij^2
void neurms_column_square_sum(const float* x, int64_t rows, int64_t columns, float* squares, int threads) {
  const int64_t strips = (columns + kStrip - 1) / kStrip;
#pragma omp parallel for num_threads(rows * columns < kAlone ? 1 : threads) schedule(static)
  for (int64_t strip = 0; strip < strips; ++strip) {
    const int64_t j = strip * kStrip, width = std::min(kStrip, columns - j);
    column_sums<false>(x + j, rows, columns, width, squares + j, nullptr);
  }
}

// Column sums of x and of its squares; v moved towards the weighted squares; the factors that this v gives; x times
// the factors. `out` holds three vectors of `columns` numbers: squares, blended, factors.
void neurms_scaled_signal(const float* x, int64_t rows, int64_t columns, const float* v, double weight, double beta,
                          double correction, double eps, double v_min, double low, double high, float* out,
                          float* sums, float* scaled, int threads) {
  const Moments moments{beta, weight, correction, eps, v_min, low, high};
  const int64_t strips = (columns + kStrip - 1) / kStrip;
#pragma omp parallel for num_threads(rows * columns < kAlone ? 1 : threads) schedule(static)
  for (int64_t strip = 0; strip < strips; ++strip) {
    const int64_t j = strip * kStrip, width = std::min(kStrip, columns - j);
    float *squares = out + j, *blended = squares + columns, *s = blended + columns;
    column_sums<true>(x + j, rows, columns, width, squares, sums + j);
    factors(squares, v + j, moments, width, blended, s);
    scale_columns(x + j, rows, columns, width, s, scaled + j);
  }
}

// v moved towards the weighted squares, and the factors that it then gives.
void neurms_moment_factors(float* v, const float* squares, int64_t count, double weight, double beta,
                           double correction, double eps, double v_min, double low, double high, float* s) {
  factors(squares, v, Moments{beta, weight, correction, eps, v_min, low, high}, count, v, s);
}

// W <- decay W - step left_i g_ij right_j; a null factor is 1.
void neurms_scaled_step(float* w, const float* g, int64_t m, int64_t n, const float* left, const float* right,
                        float step, float decay, int threads) {
#pragma omp parallel for num_threads(m * n < kAlone ? 1 : threads) schedule(static)
  for (int64_t i = 0; i < m; ++i) {
    const float l = left ? left[i] * step : step;
    float* wi = w + i * n;
    const float* gi = g + i * n;
    if (right) {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) wi[j] = decay * wi[j] - l * (gi[j] * right[j]);
    } else {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) wi[j] = decay * wi[j] - l * gi[j];
    }
  }
}

}  // extern "C"
