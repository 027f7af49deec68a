// RACS's fits that read G once: while a row is in cache, the sum that gives q_i, and then its part of the sums over
// rows that give s and the norm of what both will scale. The specification is neurms/compiled/two_sided_once.py.

#include "common.h"

namespace {

constexpr int64_t kRows = 4;         // rows taken together: fewer loads and stores of the column sums
constexpr int64_t kFlush = 64;       // rows summed in float32 before they enter the float64 totals
constexpr int64_t kChunk = 2048;     // columns summed in float32 before they enter a float64 total
constexpr int64_t kAlone = 1 << 14;  // elements below which one thread is faster than two
constexpr float kLeast = 1e-3f;      // of the mean: so much of a feature that has rested is looked at

float inverse(float x) { return x == 0 ? 0.0f : 1.0f / x; }  // NaN stays NaN
float inverse_root(float x) { return x > 0 ? 1.0f / std::sqrt(x) : 0.0f; }

// From the nearer end: with a weight of 1 the old value must leave no rounding error behind.
float blend(float old, float value, float fresh) {
  const float step = value - old;
  return fresh < 0.5f ? old + fresh * step : value - (1.0f - fresh) * step;
}

// sums_r = sum_j g_rj^2 u_j of four rows, whose sums wait for each other less than one; without u the plain sum.
// Half of the rows at `next` are fetched meanwhile, the other half by `add_rows`.
template <bool kUnit>
void dot_four(const float* g, int64_t n, const float* next, const float* u, double* sums) {
  std::fill(sums, sums + kRows, 0.0);
  int64_t j = 0;
  while (j + kLanes <= n) {
    const int64_t end = std::min(n, j + kChunk);
    Lanes a[kRows] = {};
    for (; j + kLanes <= end; j += kLanes) {
      fetch_rows<kRows / 2>(next, j);
      for (int r = 0; r < kRows; ++r) {
        const Lanes x = load(g + r * n + j), square = x * x;
        a[r] += kUnit ? square * load(u + j) : square;
      }
    }
    for (int r = 0; r < kRows; ++r) sums[r] += total(a[r]);
  }
  for (; j < n; ++j)
    for (int r = 0; r < kRows; ++r) sums[r] += g[r * n + j] * g[r * n + j] * (kUnit ? u[j] : 1.0f);
}

template <bool kUnit, bool kMore>
void dot_one(const float* g, int64_t n, const float* u, const float* v, double* first, double* second) {
  double sum = 0, other = 0;
  for (int64_t chunk = 0; chunk < n; chunk += kChunk) {
    const int64_t end = std::min(n, chunk + kChunk);
    float a = 0, b = 0;
#pragma omp simd reduction(+ : a, b)
    for (int64_t j = chunk; j < end; ++j) {
      const float square = g[j] * g[j];
      a += kUnit ? square * u[j] : square;
      if (kMore) b += square * v[j];
    }
    sum += a, other += b;
  }
  *first = sum;
  if (kMore) *second = other;
}

// Adds count rows' squares times `a` to `sums` and, with kMore, times `b` to `others`; fetches half as many rows at
// `next`.
template <int kCount, bool kMore>
void add_rows(const float* g, int64_t n, const float* next, const float* a, const float* b, float* sums,
              float* others) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    fetch_rows<kCount / 2>(next, j);
    Lanes sum = load(sums + j), other = kMore ? load(others + j) : sum;
    for (int r = 0; r < kCount; ++r) {
      const Lanes x = load(g + r * n + j), square = x * x;
      sum += square * a[r];
      if (kMore) other += square * b[r];
    }
    store(sums + j, sum);
    if (kMore) store(others + j, other);
  }
  for (; j < n; ++j) {
    float sum = sums[j], other = kMore ? others[j] : 0.0f;
    for (int r = 0; r < kCount; ++r) {
      const float square = g[r * n + j] * g[r * n + j];
      sum += square * a[r];
      if (kMore) other += square * b[r];
    }
    sums[j] = sum;
    if (kMore) others[j] = other;
  }
}

// Sums over rows: in float32 for some of them, then in float64. The first of the two sums has weights of any magnitude,
// whose products with squares would leave float32's range; they enter in units of one of them.
template <bool kMore>
class Columns {
 public:
  Columns(int64_t n, double* totals) : n_(n), totals_(totals), sums_((kMore ? 2 : 1) * n, 0.0f) {}

  template <int kCount>
  void add(const float* g, const float* next, const float* a, const float* b) {
    float shares[kCount], peak = 0;
    for (int r = 0; r < kCount; ++r) peak = a[r] > peak ? a[r] : peak;
    if (peak > kJump * unit_) flush();
    if (pending_ == 0 && peak > 0) unit_ = peak;
    for (int r = 0; r < kCount; ++r) shares[r] = a[r] / unit_;
    add_rows<kCount, kMore>(g, n_, next, shares, b, sums_.data(), sums_.data() + (kMore ? n_ : 0));
    if (!(peak == 0 && pending_ == 0)) pending_ += kCount;
    if (pending_ >= kFlush) flush();
  }

  void flush() {
    float *sums = sums_.data(), *others = sums + n_;
    const double unit = unit_;
#pragma omp simd
    for (int64_t j = 0; j < n_; ++j) totals_[j] += unit * sums[j], sums[j] = 0.0f;
    if (kMore) {
#pragma omp simd
      for (int64_t j = 0; j < n_; ++j) totals_[n_ + j] += others[j], others[j] = 0.0f;
    }
    pending_ = 0;
  }

 private:
  static constexpr float kJump = 1e3f;
  int64_t n_, pending_ = 0;
  float unit_ = 1.0f;
  double* totals_;
  std::vector<float> sums_;
};

// A matrix by rows, m x n, with the averages over its rows (q) and columns (s), old and new; a `turned` one has features
// for rows.
struct Matrix {
  const float* g;
  int64_t m, n;
  const float *old_q, *old_s;
  float *q, *s, *left, *right;
  bool turned;
};

double mean(const float* x, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += x[i];
  return sum / std::max<int64_t>(count, 1);
}

// u of every matrix: s in units of its mean, nowhere near zero; ones as long as nothing is known.
std::vector<float> start(const float* s, int64_t n, double* square) {
  const double all = mean(s, n);
  std::vector<float> unit(n, 1.0f);
  *square = 0;
  for (int64_t j = 0; j < n; ++j) {
    if (!(all <= 0)) unit[j] = s[j] / all < kLeast ? kLeast : static_cast<float>(s[j] / all);
    *square += static_cast<double>(unit[j]) * unit[j];
  }
  return unit;
}

// One thread's rows: q_i, its average, and both sums over rows.
template <bool kTracked>
void take_rows(const Matrix& a, Range own, const float* unit, double factor, float fresh, float* raw, double* totals) {
  Columns<true> columns(a.n, totals);
  float weights[kRows], inverses[kRows];
  double sums[kRows];
  const auto know = [&](int64_t i, int64_t count) {
    for (int64_t r = 0; r < count; ++r) {
      raw[i + r] = static_cast<float>(sums[r] * factor);
      a.q[i + r] = blend(a.old_q[i + r], raw[i + r], fresh);
      weights[r] = kTracked ? raw[i + r] : 1.0f;
      inverses[r] = inverse(a.q[i + r]);
    }
  };
  int64_t i = own.begin;
  for (; i + kRows <= own.end; i += kRows) {
    const float *const four = a.g + i * a.n, *const next = i + 2 * kRows <= own.end ? four + kRows * a.n : four;
    dot_four<kTracked>(four, a.n, next, unit, sums);
    know(i, kRows);
    columns.template add<kRows>(four, next + kRows / 2 * a.n, weights, inverses);
  }
  for (; i < own.end; ++i) {
    dot_one<kTracked, false>(a.g + i * a.n, a.n, unit, nullptr, sums, nullptr);
    know(i, 1);
    columns.template add<1>(a.g + i * a.n, nullptr, weights, inverses);
  }
  columns.flush();
}

// The average s, the factors and the norm, once all rows are through. `totals` are those of `parts` threads, a stride
// apart.
double finish(const Matrix& a, bool tracked, float fresh, float correction, const float* raw, const double* totals,
              int parts, int64_t stride) {
  double weight = tracked ? 0 : a.m, energy = 0;
  for (int64_t i = 0; tracked && i < a.m; ++i) weight += static_cast<double>(raw[i]) * raw[i];
  for (int64_t j = 0; j < a.n; ++j) {
    double sum = 0, other = 0;
    for (int t = 0; t < parts; ++t) sum += totals[t * stride + j], other += totals[t * stride + a.n + j];
    a.s[j] = blend(a.old_s[j], static_cast<float>(weight == 0 ? 0.0 : sum / weight), fresh);
    energy += a.s[j] == 0 ? 0.0 : other / a.s[j];
  }
  const double total = tracked ? 1.0 : a.turned ? mean(a.q, a.m) : mean(a.s, a.n);
  const double scale = correction * std::sqrt(total), one = 1.0;
  for (int64_t i = 0; i < a.m; ++i) a.left[i] = static_cast<float>((a.turned ? one : scale) * inverse_root(a.q[i]));
  for (int64_t j = 0; j < a.n; ++j) a.right[j] = static_cast<float>((a.turned ? scale : one) * inverse_root(a.s[j]));
  return scale * std::sqrt(energy);
}

// The tracked fit of a matrix that is stored by columns, n x m: its sums over columns of storage come first, so that it
// is read twice. `a` is what is stored: a.s are the averages over units, a.q over features.
double track_columns(const Matrix& a, float fresh, float correction, int threads) {
  double square, energy = 0, weight = 0;
  float peak = 0;
  const std::vector<float> unit = start(a.old_q, a.m, &square);
  std::vector<double> totals(static_cast<size_t>(a.n) * threads, 0.0);
  std::vector<float> raw(a.n), inverses(a.n);
#pragma omp parallel num_threads(threads)
  {
    const int part = omp_get_thread_num(), parts = omp_get_num_threads();
    const Range own = share(a.m, part, parts, kRows);
    Columns<false> columns(a.n, totals.data() + static_cast<size_t>(a.n) * part);
    int64_t i = own.begin;
    for (; i + kRows <= own.end; i += kRows) {
      // The rows themselves, ahead of where they are read: the next ones take .4 ms for .3 at 4096 x 1024 (two threads).
      const float* const four = a.g + i * a.n;
      columns.template add<kRows>(four, four, unit.data() + i, nullptr);
    }
    for (; i < own.end; ++i) columns.template add<1>(a.g + i * a.n, nullptr, unit.data() + i, nullptr);
    columns.flush();
#pragma omp barrier
#pragma omp single
    {
      for (int64_t j = 0; j < a.n; ++j) {
        double sum = 0;
        for (int t = 0; t < parts; ++t) sum += totals[static_cast<size_t>(a.n) * t + j];
        raw[j] = static_cast<float>(sum / square);
        peak = raw[j] > peak ? raw[j] : peak;
        a.s[j] = blend(a.old_s[j], raw[j], fresh);
        a.right[j] = correction * inverse_root(a.s[j]);
        inverses[j] = inverse(a.s[j]);
      }
      // q' in units of its largest entry: its products with squares would leave float32's range.
      for (int64_t j = 0; j < a.n && peak > 0; ++j) {
        raw[j] /= peak;
        weight += static_cast<double>(raw[j]) * raw[j] * peak;
      }
    }
#pragma omp for schedule(static) reduction(+ : energy)
    for (int64_t k = 0; k < a.m; ++k) {
      double dot, more;
      dot_one<true, true>(a.g + k * a.n, a.n, raw.data(), inverses.data(), &dot, &more);
      a.q[k] = blend(a.old_q[k], static_cast<float>(weight == 0 ? 0.0 : dot / weight), fresh);
      a.left[k] = inverse_root(a.q[k]);
      energy += a.q[k] == 0 ? 0.0 : more / a.q[k];
    }
  }
  return correction * std::sqrt(energy);
}

template <bool kTracked>
void take_all(const std::vector<Matrix>& all, const std::vector<int64_t>& places, float fresh,
              const float* corrections, double* norms, int threads) {
  int64_t units = 0, width = 0;
  for (const Matrix& a : all) units += a.m, width += 2 * a.n;
  std::vector<double> totals(static_cast<size_t>(width) * threads, 0.0), factors;
  std::vector<float> raw(units);
  std::vector<std::vector<float>> starts;
  for (const Matrix& a : all) {
    double square = static_cast<double>(a.n);
    starts.push_back(kTracked ? start(a.old_s, a.n, &square) : std::vector<float>());
    factors.push_back(1.0 / square);
  }
#pragma omp parallel num_threads(threads)
  {
    const int part = omp_get_thread_num(), parts = omp_get_num_threads();
    double* mine = totals.data() + static_cast<size_t>(width) * part;
    float* rows = raw.data();
    for (size_t k = 0; k < all.size(); mine += 2 * all[k].n, rows += all[k++].m)
      take_rows<kTracked>(all[k], share(all[k].m, part, parts, kRows), starts[k].data(), factors[k], fresh, rows, mine);
#pragma omp barrier
    const double* first = totals.data();
    rows = raw.data();
    for (size_t k = 0; k < all.size(); first += 2 * all[k].n, rows += all[k++].m)
      if (static_cast<int>(k) % parts == part)
        norms[places[k]] = finish(all[k], kTracked, fresh, corrections[places[k]], rows, first, parts, width);
  }
}

}  // namespace

extern "C" {

// Averages q (units) and s (features) of several m x n matrices moved towards the fit of one read, the factors left and
// right that they give, and the norms of left_i g_ij right_j. A `turned` one is stored by columns.
void neurms_two_sided_once(int64_t count, const float* const* g, const int64_t* m, const int64_t* n,
                           const int64_t* turned, const float* corrections, double beta, int tracked,
                           const float* const* q, const float* const* s, float* const* new_q, float* const* new_s,
                           float* const* left, float* const* right, double* norms, int threads) {
  std::vector<Matrix> all;
  std::vector<int64_t> places;
  int64_t elements = 0;
  for (int64_t k = 0; k < count; ++k) elements += m[k] * n[k];
  const int size = elements < kAlone ? 1 : threads;
  const float fresh = static_cast<float>(1.0 - beta);
  for (int64_t k = 0; k < count; ++k) {
    const Matrix stored = turned[k] ? Matrix{g[k], n[k], m[k], s[k], q[k], new_s[k], new_q[k], right[k], left[k], true}
                                    : Matrix{g[k], m[k], n[k], q[k], s[k], new_q[k], new_s[k], left[k], right[k], false};
    if (turned[k] && tracked) {
      norms[k] = track_columns(stored, fresh, corrections[k], size);
    } else {
      all.push_back(stored), places.push_back(k);
    }
  }
  if (all.empty()) return;
  if (tracked) take_all<true>(all, places, fresh, corrections, norms, size);
  else take_all<false>(all, places, fresh, corrections, norms, size);
}

}  // extern "C"
