// RMNP's step in one walk over the rows of W, M and G: M <- mu M + (1 - mu) G; R = M or, Nesterov, (1 - mu) G + mu M;
// W_i <- decay W_i - step R_i / max(||R_i||, floor). Without G, M is up to date already, and R = M.

#include "common.h"

namespace {

// Elements summed in float32 before they enter a float64 total, and fetched ahead together: 32 are too few to keep lines
// under way, 256 are more than can be.
constexpr int64_t kChunk = 128;
constexpr int64_t kShort = 2048;  // columns of which three rows leave room for the next ones in the first-level cache
constexpr int64_t kFlush = 32;   // rows summed in float32 before they enter the float64 totals
constexpr int64_t kAlone = 1 << 14;  // elements below which one thread is faster than two

struct Rule {
  float fresh, a, b, step, decay, floor;

  Rule(float mu, bool nesterov, float step, float decay, float floor)
      : fresh(1.0f - mu), a(nesterov ? fresh : 0.0f), b(nesterov ? mu : 1.0f), step(step), decay(decay), floor(floor) {}

  // An entry of R, once M's is up to date.
  template <bool kGradient>
  float entry(const float* m, const float* g, int64_t j) const {
    return kGradient ? a * g[j] + b * m[j] : m[j];
  }

  // step / max(norm, floor). Where squares have under- or overflowed: the norm again, through the largest entry.
  template <bool kGradient>
  float scale(double squares, const float* m, const float* g, int64_t count, int64_t stride) const {
    double norm = std::sqrt(squares);
    if (squares < 1e-30 || !std::isfinite(squares)) {
      float peak = 0;
      for (int64_t j = 0; j < count; ++j) peak = std::max(peak, std::fabs(entry<kGradient>(m, g, j * stride)));
      double exact = 0;
      for (int64_t j = 0; j < count && peak > 0; ++j) {
        const double r = static_cast<double>(entry<kGradient>(m, g, j * stride)) / peak;
        exact += r * r;
      }
      norm = std::sqrt(exact) * peak;
    }
    return step / std::max(static_cast<float>(norm), floor);
  }
};

// The hardware fetches ahead within a page only, and not across rows: the row of W while M and G are read, the next
// rows of M and G while W is written.
inline void fetch(const float* x, int64_t count) {
  for (int64_t j = 0; j < count; j += kLine) __builtin_prefetch(x + j);
}

inline void fetch_to_write(const float* x, int64_t count) {
  for (int64_t j = 0; j < count; j += kLine) __builtin_prefetch(x + j, 1);
}

// Advances an element of M if there is a gradient; returns the square of R's.
template <bool kGradient>
inline float advance(const Rule& rule, float* m, const float* g, int64_t j) {
  if (kGradient) m[j] += rule.fresh * (g[j] - m[j]);
  const float r = rule.entry<kGradient>(m, g, j);
  return r * r;
}

// Advances M's row; returns the sum of squares of R's.
template <bool kGradient>
double advance_row(const Rule& rule, const float* w, float* m, const float* g, int64_t n) {
  double squares = 0;
  for (int64_t chunk = 0; chunk < n; chunk += kChunk) {
    const int64_t end = std::min(n, chunk + kChunk);
    fetch_to_write(w + chunk, end - chunk);
    // In two halves, whose sums wait for each other less than one.
    const int64_t half = (end - chunk) / 2;
    float sum = 0, other = 0;
#pragma omp simd reduction(+ : sum, other)
    for (int64_t j = chunk; j < chunk + half; ++j) {
      sum += advance<kGradient>(rule, m, g, j);
      other += advance<kGradient>(rule, m, g, j + half);
    }
    if (chunk + 2 * half < end) sum += advance<kGradient>(rule, m, g, end - 1);
    squares += sum + other;
  }
  return squares;
}

template <bool kGradient>
void move_row(const Rule& rule, float scale, float* w, const float* m, const float* g, int64_t n, int64_t next) {
  for (int64_t chunk = 0; chunk < n; chunk += kChunk) {
    const int64_t end = std::min(n, chunk + kChunk);
    if (next) {
      if (kGradient) {
        fetch_to_write(m + next + chunk, end - chunk);
        fetch(g + next + chunk, end - chunk);
      } else {
        fetch(m + next + chunk, end - chunk);
      }
    }
#pragma omp simd
    for (int64_t j = chunk; j < end; ++j) w[j] = rule.decay * w[j] - scale * rule.entry<kGradient>(m, g, j);
  }
}

template <bool kGradient>
void update_rows(const Rule& rule, float* w, float* momentum, const float* g, int64_t n, Range rows) {
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    float *wi = w + i * n, *mi = momentum + i * n;
    const float* gi = kGradient ? g + i * n : nullptr;
    const double squares = advance_row<kGradient>(rule, wi, mi, gi, n);
    const float scale = rule.scale<kGradient>(squares, mi, gi, n, 1);
    // Of longer rows the next ones drive out what is still to be moved: 9.7 ms for 7.5 at 4096 x 4096 (Zen 4, 2 threads).
    move_row<kGradient>(rule, scale, wi, mi, gi, n, n <= kShort && i + 1 < rows.end ? n : 0);
  }
}

// The same for n rows that hold a piece of every unit: advances M, and adds up the squares of each column of R.
void advance_columns(const Rule& rule, float* m, const float* g, int64_t n, int64_t units, double* totals) {
  std::vector<float> sums(units, 0.0f);
  for (int64_t i = 0; i < n; ++i) {
    float* mi = m + i * units;
    const float* gi = g + i * units;
#pragma omp simd
    for (int64_t j = 0; j < units; ++j) {
      mi[j] += rule.fresh * (gi[j] - mi[j]);
      const float r = rule.a * gi[j] + rule.b * mi[j];
      sums[j] += r * r;
    }
    if (i % kFlush == kFlush - 1 || i == n - 1)
      for (int64_t j = 0; j < units; ++j) totals[j] += sums[j], sums[j] = 0;
  }
}

// For matrices that are stored by columns, n x m in memory. Two walks: a strip of columns that would fit a cache touches a
// page for every few elements, and lines at strides of a power of two drive each other out.
void update_columns(const Rule& rule, float* w, float* momentum, const float* g, int64_t n, int64_t m, int threads) {
  std::vector<double> totals(static_cast<size_t>(m) * threads, 0.0);
  std::vector<float> scales(m);
#pragma omp parallel num_threads(threads)
  {
    const int id = omp_get_thread_num(), parts = omp_get_num_threads();
    const Range rows = share(n, id, parts, 1);
    advance_columns(rule, momentum + rows.begin * m, g + rows.begin * m, rows.end - rows.begin, m,
                    totals.data() + static_cast<size_t>(m) * id);
#pragma omp barrier
    const Range own = share(m, id, parts, kLine);
    for (int64_t j = own.begin; j < own.end; ++j) {
      double squares = 0;
      for (int t = 0; t < parts; ++t) squares += totals[static_cast<size_t>(m) * t + j];
      scales[j] = rule.scale<true>(squares, momentum + j, g + j, n, m);
    }
#pragma omp barrier
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      float* wi = w + i * m;
      const float *mi = momentum + i * m, *gi = g + i * m, *scale = scales.data();
#pragma omp simd
      for (int64_t j = 0; j < m; ++j) wi[j] = rule.decay * wi[j] - scale[j] * (rule.a * gi[j] + rule.b * mi[j]);
    }
  }
}

}  // namespace

extern "C" {

// The step of several m x n matrices with a rate, decay and sizes each, which the threads take without waiting in
// between, but for those that are stored by columns (`turned`). Without `g` no momentum is advanced, none is turned.
void neurms_row_normalized_updates(int64_t count, float* const* w, float* const* momentum, const float* const* g,
                                   const int64_t* m, const int64_t* n, const int64_t* turned, const float* steps,
                                   const float* decays, float mu, int nesterov, float floor, int threads) {
  int64_t elements = 0;
  for (int64_t k = 0; k < count; ++k) elements += m[k] * n[k];
  const int size = elements < kAlone ? 1 : threads;
#pragma omp parallel num_threads(size)
  {
    const int part = omp_get_thread_num(), parts = omp_get_num_threads();
    for (int64_t k = 0; k < count; ++k) {
      if (turned[k]) continue;
      const Rule rule(mu, nesterov, steps[k], decays[k], floor);
      const Range rows = share(m[k], part, parts, 1);
      if (g)
        update_rows<true>(rule, w[k], momentum[k], g[k], n[k], rows);
      else
        update_rows<false>(rule, w[k], momentum[k], nullptr, n[k], rows);
    }
  }
  for (int64_t k = 0; k < count; ++k) {
    if (!turned[k]) continue;
    const Rule rule(mu, nesterov, steps[k], decays[k], floor);
    update_columns(rule, w[k], momentum[k], g[k], n[k], m[k], size);
  }
}

}  // extern "C"
