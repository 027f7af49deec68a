// NeuRMS's passes: over D and H, tall matrices whose columns are units or features, and over W. Contiguous
// row-major float32 like the other kernels; the eager definitions in neurms/compiled/{moments,signals,
// reductions,update,finite}.py are the specification. Threads share the rows of D and H and read them from end to end: columns, whose sums
// would then stay with one thread, lie a page apart from row to row.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include <omp.h>

#include "common.h"
#include "move.h"
#include "rounded.h"

namespace {

constexpr int64_t kStrip = 1024;    // columns taken together: their sums stay in the first-level cache
constexpr int64_t kWide = 64;       // columns that narrow rows are taken together to
constexpr int64_t kFlush = 32;      // rows summed in float32 before they enter the float64 totals
constexpr int64_t kAlone = 1 << 14; // elements below which one thread is faster than two
constexpr int64_t kBlock = 8192;    // elements looked at before a thread may stop

struct Moments {
  double beta, weight, correction, eps, v_min, low, high, kappa;
};

// Adds the squares of `width` columns, and the elements themselves if so asked, to totals.
template <bool kWithSums, typename Number>
void add_columns(const Number* x, int64_t rows, int64_t stride, int64_t width, double* squares, double* sums) {
  for (int64_t first = 0; first < rows; first += kFlush) {
    float a[kStrip], b[kStrip];
    std::fill(a, a + width, 0.0f);
    if (kWithSums) std::fill(b, b + width, 0.0f);
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

// The same of whole rows. Those of few columns are too short for a loop: several are one row of it.
template <bool kWithSums, typename Number>
void add_rows(const Number* x, int64_t rows, int64_t columns, double* squares, double* sums) {
  const int64_t times = columns == 0 ? 0 : std::min(rows, kWide / columns);
  if (times < 2) {
    for (int64_t j = 0; j < columns; j += kStrip)
      add_columns<kWithSums>(x + j, rows, columns, std::min(kStrip, columns - j), squares + j, sums + j);
    return;
  }
  double a[kWide] = {0}, b[kWide] = {0};
  const int64_t width = times * columns, whole = rows / times;
  add_columns<kWithSums>(x, whole, width, width, a, b);
  add_columns<kWithSums>(x + whole * width, 1, 0, rows % times * columns, a, b);
  for (int64_t i = 0, j = 0; i < width; ++i, j = j + 1 == columns ? 0 : j + 1) {
    squares[j] += a[i];
    if (kWithSums) sums[j] += b[i];
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
  add_rows<kWithSums>(x + own.begin * columns, own.end - own.begin, columns, mine, mine + columns);
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

// The factor of one corrected moment, before it is clipped. NaN stays NaN: std::max would hide it.
inline double inverse_root(double moment, const Moments& m) {
  const double root = moment / m.correction + m.eps;
  return 1.0 / std::sqrt(root < m.v_min ? m.v_min : root);
}

inline double clip(double x, double low, double high) {
  const double raised = x < low ? low : x;
  return raised > high ? high : raised;
}

// Within kappa of the median, of two middle ones the lower.
void clip_to_median(float* s, int64_t count, double kappa) {
  if (!count) return;
  if (std::any_of(s, s + count, [](float x) { return std::isnan(x); })) {
    std::fill(s, s + count, std::nanf(""));
    return;
  }
  std::vector<float> sorted(s, s + count);
  const auto middle = sorted.begin() + (count - 1) / 2;
  std::nth_element(sorted.begin(), middle, sorted.end());
  const float low = *middle / static_cast<float>(kappa), high = *middle * static_cast<float>(kappa);
  for (int64_t j = 0; j < count; ++j) s[j] = static_cast<float>(clip(s[j], low, high));
}

// v moved towards the weighted squares, and the factors that it then gives; of v as it is without squares. A kappa of
// 0 clips to [low, high]; else whoever has all factors clips.
void factors(const float* squares, const float* v, const Moments& m, int64_t width, float* blended, float* out) {
  for (int64_t j = 0; j < width; ++j) {
    float moment = v[j];
    if (squares) {
      // The steps of the eager definition, whose moment is float32 too: it overflows where that does.
      const float sample = static_cast<float>(squares[j] * m.weight);
      moment = static_cast<float>(moment + (1.0 - m.beta) * (static_cast<double>(sample) - moment));
      blended[j] = moment;
    }
    const double scale = inverse_root(moment, m);
    out[j] = static_cast<float>(m.kappa ? scale : clip(scale, m.low, m.high));
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

// A weight (m x n). Null factors are 1; a null velocity is none.
struct Target {
  float* w;
  const float* g;
  float* velocity;
  int64_t m, n;
  const float *left, *right;
  float rate, decay;
};

void move_rows(const Target& t, const Rule& rule, Range rows) {
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    const Row row = rule.row(t.velocity, t.left ? t.left[i] : 1.0f, t.right, t.rate, t.decay);
    move<false>(row, t.w + i * t.n, t.g + i * t.n, t.velocity ? t.velocity + i * t.n : nullptr, t.n);
  }
}

// The same; returns the sum of squares of what these rows moved by, but for the rate.
double move_measured_rows(const Target& t, const Rule& rule, Range rows) {
  double total = 0.0;
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    const double left = t.left && (!t.velocity || rule.scale_velocity) ? t.left[i] : 1.0;
    Row row = rule.row(t.velocity, t.left ? t.left[i] : 1.0f, t.right, t.rate, t.decay);
    double squares = 0.0;
    for (int64_t j = 0; j < t.n; j += kStrip) {
      const int64_t at = i * t.n + j, width = std::min(kStrip, t.n - j);
      squares += move<true>(row, t.w + at, t.g + at, t.velocity ? t.velocity + at : nullptr, width);
      if (row.right_in) row.right_in += width;
      if (row.right_out) row.right_out += width;
    }
    total += left * left * squares;
  }
  return total;
}

// sum_j (x_j right_j)^2; a null `right` is 1.
template <bool kRight>
float strip_square_sum(const float* x, const float* right, int64_t n) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    const float scaled = kRight ? x[j] * right[j] : x[j];
    sum += scaled * scaled;
  }
  return sum;
}

// The sum of squares of rows of L X R.
double rows_square_sum(const float* x, int64_t n, const float* left, const float* right, Range rows) {
  double total = 0.0;
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    double squares = 0.0;
    for (int64_t j = 0; j < n; j += kStrip) {
      const int64_t width = std::min(kStrip, n - j);
      squares += right ? strip_square_sum<true>(x + i * n + j, right + j, width)
                       : strip_square_sum<false>(x + i * n + j, nullptr, width);
    }
    total += left ? static_cast<double>(left[i]) * left[i] * squares : squares;
  }
  return total;
}

int64_t elements(int64_t count, const int64_t* sizes) {
  int64_t total = 0;
  for (int64_t k = 0; k < count; ++k) total += sizes[k];
  return total;
}

}  // namespace

extern "C" {

// Arguments `x` are float32, or bfloat16 if `rounded`.

// Whether no magnitude in several arrays exceeds the array's bound.
int neurms_within(int64_t count, const void* const* x, const int* rounded, const int64_t* sizes, const float* bounds,
                  int threads) {
  uint32_t bad = 0;
#pragma omp parallel num_threads(elements(count, sizes) < kAlone ? 1 : threads) reduction(| : bad)
  {
    const int part = omp_get_thread_num(), parts = omp_get_num_threads();
    for (int64_t k = 0; k < count && !bad; ++k) {
      const Range own = share(sizes[k], part, parts, kLine);
      for (int64_t block = own.begin; block < own.end; block += kBlock) {
        const int64_t width = std::min(kBlock, own.end - block);
        bad |= rounded[k] ? exceeds(static_cast<const uint16_t*>(x[k]) + block, width, bounds[k])
                          : exceeds(static_cast<const float*>(x[k]) + block, width, bounds[k]);
      }
    }
  }
  return !bad;
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
  const Moments moments{beta, weight, correction, eps, v_min, low, high, 0.0};
  if (rounded) scaled_signal(static_cast<const uint16_t*>(x), rows, columns, v, moments, out, sums, nullptr, threads);
  else scaled_signal(static_cast<const float*>(x), rows, columns, v, moments, out, sums, scaled, threads);
}

// For several vectors, of `sizes`: `factors`, with their moments moved into `moved` unless squares and moved are null. A
// kappa of 0 clips factors to [low, high], another one to within kappa of their median.
void neurms_move_moments(int64_t count, const float* const* v, const float* const* squares, const int64_t* sizes,
                         const double* weights, const double* corrections, double beta, double eps, double v_min,
                         double low, double high, double kappa, float* const* moved, float* const* made) {
  for (int64_t k = 0; k < count; ++k) {
    const Moments moments{beta, squares ? weights[k] : 0.0, corrections[k], eps, v_min, low, high, kappa};
    factors(squares ? squares[k] : nullptr, v[k], moments, sizes[k], moved ? moved[k] : nullptr, made[k]);
    if (kappa) clip_to_median(made[k], sizes[k], kappa);
  }
}

// For several weights (m x n), which the threads take without waiting in between: W <- decay W - rate L G R; with a
// velocity, V <- momentum V + fresh L G R, or fresh G unless `scale_gradient`, and W <- decay W - rate V, or - rate L V
// R if `scale_velocity`; with `nesterov` momentum V, and what has entered it, moves W in the place of V. W may be G where
// its decay is 0. Unless `measured` is null it becomes the sums of squares of what the weights moved by, but for the
// rate.
void neurms_apply_updates(int64_t count, float* const* w, const float* const* g, float* const* velocity,
                          const int64_t* m, const int64_t* n, const float* const* left, const float* const* right,
                          const float* rate, const float* decay, float momentum, float fresh, int scale_gradient,
                          int scale_velocity, int nesterov, double* measured, int threads) {
  const Rule rule{momentum, fresh, scale_gradient != 0, scale_velocity != 0, nesterov != 0};
  int64_t total = 0;
  for (int64_t k = 0; k < count; ++k) total += m[k] * n[k];
  const int size = total < kAlone ? 1 : threads;
  std::vector<double> sums(measured ? size * count : 0);
#pragma omp parallel num_threads(size)
  {
    const int part = omp_get_thread_num(), parts = omp_get_num_threads();
    for (int64_t k = 0; k < count; ++k) {
      const Target target{w[k], g[k], velocity[k], m[k], n[k], left[k], right[k], rate[k], decay[k]};
      const Range rows = share(m[k], part, parts, 1);
      if (measured) sums[part * count + k] = move_measured_rows(target, rule, rows);
      else move_rows(target, rule, rows);
    }
  }
  for (int64_t k = 0; k < count && measured; ++k) {
    measured[k] = 0.0;
    for (int part = 0; part < size; ++part) measured[k] += sums[part * count + k];
  }
}

// For several matrices (m x n) the sums of squares of L X R; null factors are 1.
void neurms_move_square_sums(int64_t count, const float* const* x, const int64_t* m, const int64_t* n,
                        const float* const* left, const float* const* right, double* sums, int threads) {
  int64_t total = 0;
  for (int64_t k = 0; k < count; ++k) total += m[k] * n[k];
  const int size = total < kAlone ? 1 : threads;
  std::vector<double> parts(size * count);
#pragma omp parallel num_threads(size)
  {
    const int part = omp_get_thread_num();
    for (int64_t k = 0; k < count; ++k) {
      const Range rows = share(m[k], part, omp_get_num_threads(), 1);
      parts[part * count + k] = rows_square_sum(x[k], n[k], left[k], right[k], rows);
    }
  }
  for (int64_t k = 0; k < count; ++k) {
    sums[k] = 0.0;
    for (int part = 0; part < size; ++part) sums[k] += parts[part * count + k];
  }
}

}  // extern "C"
