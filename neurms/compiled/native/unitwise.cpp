// NeuRMS's passes: over D and H, tall matrices whose columns are units or features, and over W. Contiguous
// row-major float32 like the other kernels; the eager definitions in neurms/compiled/{signals,reductions,update,
// finite}.py are the specification. Threads share the rows of D and H and read them from end to end: columns, whose sums
// would then stay with one thread, lie a page apart from row to row.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include <omp.h>

#include "common.h"

namespace {

constexpr int64_t kStrip = 1024;    // columns taken together: their sums stay in the first-level cache
constexpr int64_t kFlush = 32;      // rows summed in float32 before they enter the float64 totals
constexpr int64_t kAlone = 1 << 14; // elements below which one thread is faster than two

struct Moments {
  double beta, weight, correction, eps, v_min, low, high;
};

// A bfloat16 number is the upper half of a float32's bits.
inline uint32_t bits(float x) {
  uint32_t found;
  std::memcpy(&found, &x, sizeof x);
  return found;
}
inline uint32_t bits(uint16_t x) { return static_cast<uint32_t>(x) << 16; }
inline float value(float x) { return x; }
inline float value(uint16_t x) {
  const uint32_t wide = bits(x);
  float found;
  std::memcpy(&found, &wide, sizeof found);
  return found;
}

// Adds the squares of `width` columns, and the elements themselves if so asked, to totals.
template <bool kWithSums, typename Number>
void add_columns(const Number* x, int64_t rows, int64_t stride, int64_t width, double* squares, double* sums) {
  for (int64_t first = 0; first < rows; first += kFlush) {
    float a[kStrip] = {0}, b[kStrip] = {0};
    const int64_t last = std::min(rows, first + kFlush);
    int64_t i = first;
    for (; i + 4 <= last; i += 4) {
      const Number *p = x + i * stride, *q = p + stride, *r = q + stride, *s = r + stride;
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) {
        const float first = value(p[j]), second = value(q[j]), third = value(r[j]), fourth = value(s[j]);
        a[j] += (first * first + second * second) + (third * third + fourth * fourth);
        if (kWithSums) b[j] += (first + second) + (third + fourth);
      }
    }
    for (; i < last; ++i) {
      const Number* p = x + i * stride;
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) {
        const float one = value(p[j]);
        a[j] += one * one;
        if (kWithSums) b[j] += one;
      }
    }
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) {
      squares[j] += a[j];
      if (kWithSums) sums[j] += b[j];
    }
  }
}

// Totals of each thread's rows, and what is made of them once all threads are through. Called by every thread of a
// team; `made(j, width)` is called for a part of the columns whose `squares` and `sums` are complete.
template <bool kWithSums, typename Number, typename Made>
void sum_columns(const Number* x, int64_t rows, int64_t columns, std::vector<double>& totals, float* squares,
                 float* sums, const Made& made) {
  const int part = omp_get_thread_num(), parts = omp_get_num_threads();
  const Range own = share(rows, part, parts, kFlush);
  double* mine = totals.data() + part * 2 * columns;
  std::fill(mine, mine + 2 * columns, 0.0);
  for (int64_t j = 0; j < columns; j += kStrip)
    add_columns<kWithSums>(x + own.begin * columns + j, own.end - own.begin, columns, std::min(kStrip, columns - j),
                           mine + j, mine + columns + j);
#pragma omp barrier
  const Range part_of = share(columns, part, parts, kLine);
  for (int64_t j = part_of.begin; j < part_of.end; ++j) {
    double square = 0.0, sum = 0.0;
    for (int other = 0; other < parts; ++other) {
      square += totals[other * 2 * columns + j];
      if (kWithSums) sum += totals[other * 2 * columns + columns + j];
    }
    squares[j] = static_cast<float>(square);
    if (kWithSums) sums[j] = static_cast<float>(sum);
  }
  made(part_of.begin, part_of.end - part_of.begin);
}

// Memory for the totals of a team, which its leader keeps for the next one.
std::vector<double>& totals_for(int64_t columns, int threads) {
  static thread_local std::vector<double> totals;
  if (static_cast<int64_t>(totals.size()) < threads * 2 * columns) totals.resize(threads * 2 * columns);
  return totals;
}

// A team is no larger than there are rows for.
int team(int64_t rows, int64_t columns, int threads) {
  if (rows * columns < kAlone) return 1;
  return static_cast<int>(std::min<int64_t>(threads, (rows + kFlush - 1) / kFlush));
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

// Whether a magnitude exceeds `bound`, as every NaN does: floats without their sign are ordered as integers are.
template <typename Number>
uint32_t exceeds(const Number* x, int64_t count, float bound) {
  const uint32_t magnitude = 0x7fffffffu;
  uint32_t peak = 0;
#pragma omp simd reduction(max : peak)
  for (int64_t i = 0; i < count; ++i) peak = std::max(peak, bits(x[i]) & magnitude);
  return peak > bits(bound);
}

template <typename Number>
int all_within(const Number* x, int64_t count, float bound, int threads) {
  uint32_t bad = 0;
#pragma omp parallel for num_threads(count < kAlone ? 1 : threads) schedule(static) reduction(| : bad)
  for (int64_t block = 0; block < count; block += 8192)
    bad |= exceeds(x + block, std::min<int64_t>(8192, count - block), bound);
  return !bad;
}

template <typename Number>
void column_square_sum(const Number* x, int64_t rows, int64_t columns, float* squares, int threads) {
  const int size = team(rows, columns, threads);
  std::vector<double>& totals = totals_for(columns, size);
#pragma omp parallel num_threads(size)
  sum_columns<false>(x, rows, columns, totals, squares, nullptr, [](int64_t, int64_t) {});
}

inline void scale_rows(const float* x, int64_t rows, int64_t columns, const float* s, float* out) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* p = x + i * columns;
    float* q = out + i * columns;
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) q[j] = p[j] * s[j];
  }
}
inline void scale_rows(const uint16_t*, int64_t, int64_t, const float*, float*) {}

template <typename Number>
void scaled_signal(const Number* x, int64_t rows, int64_t columns, const float* v, const Moments& moments, float* out,
                   float* sums, float* scaled, int threads) {
  float *squares = out, *blended = out + columns, *s = blended + columns;
  const int size = team(rows, columns, threads);
  std::vector<double>& totals = totals_for(columns, size);
#pragma omp parallel num_threads(size)
  {
    sum_columns<true>(x, rows, columns, totals, squares, sums, [&](int64_t j, int64_t width) {
      factors(squares + j, v + j, moments, width, blended + j, s + j);
    });
#pragma omp barrier
    const Range own = share(rows, omp_get_thread_num(), omp_get_num_threads(), kFlush);
    const int64_t first = own.begin * columns;
    if (scaled) scale_rows(x + first, own.end - own.begin, columns, s, scaled + first);
  }
}

// The pass over weights: step, decay and momentum of those that move together.
struct Rates {
  float step, momentum;
  bool coupled;  // the velocity is scaled once more on its way into the weight
};

// A weight (m x n), or a bias (m x 1). Null factors are 1; a null velocity is none.
struct Target {
  float* w;
  const float* g;
  float* velocity;
  int64_t m, n;
  const float *left, *right;
  float decay;
};

template <bool kWithRight, bool kWithVelocity>
void move_row(float* w, const float* g, float* velocity, int64_t n, float l, const float* right, float decay,
              const Rates& r) {
  const float back = r.coupled ? l * r.step : r.step;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const float scaled = kWithRight ? g[j] * right[j] : g[j];
    if (kWithVelocity) {
      velocity[j] = r.momentum * velocity[j] + l * scaled;
      const float again = kWithRight && r.coupled ? velocity[j] * right[j] : velocity[j];
      w[j] = decay * w[j] - back * again;
    } else {
      w[j] = decay * w[j] - l * r.step * scaled;
    }
  }
}

void move_rows(const Target& t, const Rates& r, Range rows) {
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    const float l = t.left ? t.left[i] : 1.0f;
    float *w = t.w + i * t.n, *velocity = t.velocity ? t.velocity + i * t.n : nullptr;
    const float* g = t.g + i * t.n;
    if (t.right && velocity) move_row<true, true>(w, g, velocity, t.n, l, t.right, t.decay, r);
    else if (t.right) move_row<true, false>(w, g, velocity, t.n, l, t.right, t.decay, r);
    else if (velocity) move_row<false, true>(w, g, velocity, t.n, l, t.right, t.decay, r);
    else move_row<false, false>(w, g, velocity, t.n, l, t.right, t.decay, r);
  }
}

}  // namespace

extern "C" {

// Arguments `x` are float32, or bfloat16 if `rounded`.

// Whether no magnitude exceeds `bound`.
int neurms_all_within(const void* x, int rounded, int64_t count, float bound, int threads) {
  return rounded ? all_within(static_cast<const uint16_t*>(x), count, bound, threads)
                 : all_within(static_cast<const float*>(x), count, bound, threads);
}

// squares_j = sum_i x_ij^2
void neurms_column_square_sum(const void* x, int rounded, int64_t rows, int64_t columns, float* squares,
                              int threads) {
  if (rounded) column_square_sum(static_cast<const uint16_t*>(x), rows, columns, squares, threads);
  else column_square_sum(static_cast<const float*>(x), rows, columns, squares, threads);
}

// Column sums of x and of its squares; v moved towards the weighted squares; the factors that this v gives; x times
// the factors, unless `scaled` is null, as it must be for a rounded x. `out` holds three vectors of `columns` numbers:
// squares, blended, factors.
void neurms_scaled_signal(const void* x, int rounded, int64_t rows, int64_t columns, const float* v, double weight,
                          double beta, double correction, double eps, double v_min, double low, double high,
                          float* out, float* sums, float* scaled, int threads) {
  const Moments moments{beta, weight, correction, eps, v_min, low, high};
  if (rounded) scaled_signal(static_cast<const uint16_t*>(x), rows, columns, v, moments, out, sums, nullptr, threads);
  else scaled_signal(static_cast<const float*>(x), rows, columns, v, moments, out, sums, scaled, threads);
}

// v moved towards the weighted squares, and the factors that it then gives.
void neurms_moment_factors(float* v, const float* squares, int64_t count, double weight, double beta,
                           double correction, double eps, double v_min, double low, double high, float* s) {
  factors(squares, v, Moments{beta, weight, correction, eps, v_min, low, high}, count, v, s);
}

// W <- decay W - step left_i g_ij right_j; a null factor is 1.
void neurms_scaled_step(float* w, const float* g, int64_t m, int64_t n, const float* left, const float* right,
                        float step, float decay, int threads) {
  const Target target{w, g, nullptr, m, n, left, right, decay};
  const Rates rates{step, 0.0f, false};
#pragma omp parallel for num_threads(m * n < kAlone ? 1 : threads) schedule(static)
  for (int64_t i = 0; i < m; ++i) move_rows(target, rates, {i, i + 1});
}

// V <- momentum V + left_i g_ij right_j; W <- decay W - step V, or - step left_i V_ij right_j if `coupled`.
void neurms_scaled_momentum_step(float* w, float* velocity, const float* g, int64_t m, int64_t n, const float* left,
                                 const float* right, float step, float momentum, float decay, int coupled,
                                 int threads) {
  const Target target{w, g, velocity, m, n, left, right, decay};
  const Rates rates{step, momentum, coupled != 0};
#pragma omp parallel for num_threads(m * n < kAlone ? 1 : threads) schedule(static)
  for (int64_t i = 0; i < m; ++i) move_rows(target, rates, {i, i + 1});
}

// neurms_moment_factors of several layers.
void neurms_moment_factors_each(int64_t count, float* const* v, const float* const* squares, const int64_t* sizes,
                                const double* weights, const double* corrections, double beta, double eps,
                                double v_min, double low, double high, float* const* s) {
  for (int64_t k = 0; k < count; ++k)
    factors(squares[k], v[k], Moments{beta, weights[k], corrections[k], eps, v_min, low, high}, sizes[k], v[k], s[k]);
}

// The steps above for several weights and biases, which the threads take without waiting in between. A velocity may be
// null for all of them alike.
void neurms_scaled_steps_each(int64_t count, float* const* w, const float* const* g, float* const* velocity,
                              const int64_t* m, const int64_t* n, const float* const* left, const float* const* right,
                              const float* decay, float step, float momentum, int coupled, int threads) {
  const Rates rates{step, momentum, coupled != 0};
#pragma omp parallel num_threads(threads)
  {
    const int part = omp_get_thread_num(), parts = omp_get_num_threads();
    for (int64_t k = 0; k < count; ++k)
      move_rows({w[k], g[k], velocity ? velocity[k] : nullptr, m[k], n[k], left[k], right[k], decay[k]}, rates,
                share(m[k], part, parts, 1));
  }
}

// Whether no magnitude in several arrays exceeds the array's bound.
int neurms_all_within_each(int64_t count, const float* const* x, const int64_t* sizes, const float* bounds,
                           int threads) {
  uint32_t bad = 0;
#pragma omp parallel num_threads(threads) reduction(| : bad)
  {
    const int part = omp_get_thread_num(), parts = omp_get_num_threads();
    for (int64_t k = 0; k < count; ++k) {
      const Range own = share(sizes[k], part, parts, kLine);
      bad |= exceeds(x[k] + own.begin, own.end - own.begin, bounds[k]);
    }
  }
  return !bad;
}

}  // extern "C"
