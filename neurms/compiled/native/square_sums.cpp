// Variant P's pass over gradients, R_i = sum_j x_ij^2 and C_j = sum_i x_ij^2 in one read, and the factors that follow. X
// is the gradient, or what it makes of an average that it is about to enter: fresh g + kept v, which is never stored. In
// float64 throughout: squares of float32 numbers always fit, and the pass still waits for memory.

#include "common.h"

namespace {

constexpr int64_t kRows = 8;         // rows that threads share: fewer loads and stores of the column sums
constexpr int64_t kShort = 2048;     // columns whose sums leave room in the first-level cache
constexpr int64_t kAlone = 1 << 14;  // elements below which one thread is faster than two

// The matrices whose squares are added up: fresh g + kept v, or g alone where v is null.
struct Mixed {
  const float *g, *v;
  double fresh, kept;

  Mixed from(int64_t start) const { return {g + start, v ? v + start : nullptr, fresh, kept}; }
};

template <bool kMixed>
inline Wide wide_at(const Mixed& x, int64_t at) {
  const Wide g = load_wide(x.g + at);
  return kMixed ? x.fresh * g + x.kept * load_wide(x.v + at) : g;
}

template <bool kMixed>
inline double one_at(const Mixed& x, int64_t at) {
  return kMixed ? x.fresh * x.g[at] + x.kept * x.v[at] : static_cast<double>(x.g[at]);
}

// Adds the squares of some rows to `columns`, and stores their sums; as many rows, which begin at `next`, are fetched
// meanwhile, if so asked.
template <int kCount, bool kNext, bool kMixed>
void take(const Mixed& x, int64_t n, int64_t next, double* rows, double* columns) {
  Wide sums[kCount] = {}, others[kCount] = {};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    if (kNext) fetch_rows<kCount>(x.g + next, j);
    if (kNext && kMixed) fetch_rows<kCount>(x.v + next, j);
    Wide first = load(columns + j), second = load(columns + j + kDoubles);
    for (int64_t r = 0; r < kCount; ++r) {
      const Wide one = wide_at<kMixed>(x, r * n + j), other = wide_at<kMixed>(x, r * n + j + kDoubles);
      sums[r] += one * one, others[r] += other * other;
      first += one * one, second += other * other;
    }
    store(columns + j, first), store(columns + j + kDoubles, second);
  }
  for (int64_t r = 0; r < kCount; ++r) rows[r] = total(sums[r] + others[r]);
  for (; j < n; ++j)
    for (int64_t r = 0; r < kCount; ++r) {
      const double own = one_at<kMixed>(x, r * n + j);
      rows[r] += own * own, columns[j] += own * own;
    }
}

template <bool kMixed>
void take_one(const Mixed& x, int64_t n, double* row, double* columns) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    const double own = one_at<kMixed>(x, j);
    sum += own * own;
    columns[j] += own * own;
  }
  *row = sum;
}

template <bool kMixed>
void take_rows(const Mixed& x, Range own, int64_t n, double* rows, double* columns) {
  int64_t i = own.begin;
  // Column sums that come from the second-level cache are worth fewer visits; the hardware follows eight rows.
  for (; n > kShort && i + 8 <= own.end; i += 8) take<8, false, kMixed>(x.from(i * n), n, 0, rows + i, columns);
  for (; i + 4 <= own.end; i += 4)
    take<4, true, kMixed>(x.from(i * n), n, i + 8 <= own.end ? 4 * n : 0, rows + i, columns);
  for (; i < own.end; ++i) take_one<kMixed>(x.from(i * n), n, rows + i, columns);
}

// moved = sqrt of the average of root^2 and the squares; returns the sum of the averages.
double move_roots(const float* roots, const double* squares, double beta, int64_t count, float* moved) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < count; ++i) {
    const double old = static_cast<double>(roots[i]) * roots[i];
    const double average = old + (1.0 - beta) * (squares[i] - old);
    moved[i] = static_cast<float>(std::sqrt(average));
    total += average;
  }
  return total;
}

// factor_i = scale / root_i within kappa of the lower median of its like, or, `one_sided`, no more than kappa times it;
// zero where the root is. With damping, of the roots of (root_i^2 + damping mean) / (1 + damping).
void bounded_inverses(const float* roots, int64_t count, double kappa, double scale, double damping, double mean,
                      int one_sided, float* factors) {
  const auto damped = [&](double root) {
    return damping == 0 ? root : std::sqrt((root * root + damping * mean) / (1.0 + damping));
  };
  std::vector<float> alive;
  alive.reserve(count);
  for (int64_t i = 0; i < count; ++i)
    if (roots[i] >= kTiny) alive.push_back(static_cast<float>(damped(roots[i])));
  double low = 0, high = 0;
  if (!alive.empty()) {
    // The lower median of the inverses is the upper one of the roots.
    const auto middle = alive.begin() + alive.size() / 2;
    std::nth_element(alive.begin(), middle, alive.end());
    low = *middle / kappa, high = one_sided ? HUGE_VAL : *middle * kappa;
  }
  for (int64_t i = 0; i < count; ++i) {
    const double root = damped(roots[i]);
    // NaN stays NaN: std::max and std::min would hide it.
    const double bounded = root < low ? low : root > high ? high : root;
    factors[i] = static_cast<float>(roots[i] < kTiny ? 0.0 * scale : scale / bounded);
  }
}

}  // namespace

extern "C" {

// Row and column sums of squares of several m x n matrices, which the threads take without waiting in between: of fresh
// g + kept v, or of g itself where v is null.
void neurms_square_sums(int64_t count, const float* const* g, const float* const* v, double fresh, double kept,
                        const int64_t* m, const int64_t* n, double* const* rows, double* const* columns,
                        int threads) {
  int64_t elements = 0, width = 0;
  for (int64_t k = 0; k < count; ++k) elements += m[k] * n[k], width += n[k];
  const int size = elements < kAlone ? 1 : threads;
  std::vector<double> totals(static_cast<size_t>(width) * size);
#pragma omp parallel num_threads(size)
  {
    const int part = omp_get_thread_num(), parts = omp_get_num_threads();
    double* mine = totals.data() + static_cast<size_t>(width) * part;
    for (int64_t k = 0; k < count; mine += n[k++]) {
      const Mixed x{g[k], v ? v[k] : nullptr, fresh, kept};
      const Range own = share(m[k], part, parts, kRows);
      if (x.v) take_rows<true>(x, own, n[k], rows[k], mine);
      else take_rows<false>(x, own, n[k], rows[k], mine);
    }
#pragma omp barrier
    int64_t first = 0;
    for (int64_t k = 0; k < count; first += n[k++]) {
      const Range own = share(n[k], part, parts, kLine);
      for (int64_t j = own.begin; j < own.end; ++j) {
        double sum = 0;
        for (int other = 0; other < parts; ++other) sum += totals[static_cast<size_t>(width) * other + first + j];
        columns[k][j] = sum;
      }
    }
  }
}

// One more column for each of several matrices, a null pointer for one of zeros: its squares are added to the sums of
// the rows, and up. Mixed as the matrices are. A matrix that has no such column has a null pointer for its sum.
void neurms_column_squares(int64_t count, const float* const* g, const float* const* v, double fresh, double kept,
                           const int64_t* m, double* const* rows, double* const* sums) {
  for (int64_t k = 0; k < count; ++k) {
    double sum = 0;
    if (g[k] != nullptr) {
      const Mixed x{g[k], v ? v[k] : nullptr, fresh, kept};
      for (int64_t i = 0; i < m[k]; ++i) {
        const double own = x.v ? one_at<true>(x, i) : one_at<false>(x, i);
        rows[k][i] += own * own;
        sum += own * own;
      }
    }
    if (sums[k] != nullptr) *sums[k] = sum;
  }
}

// The roots q (m) and s (n) of several matrices' averages moved towards the sums, and the factors that they then give.
void neurms_gradient_factors(int64_t count, const double* const* rows, const double* const* columns,
                             const float* const* q, const float* const* s, const int64_t* m, const int64_t* n,
                             const double* corrections, double beta, double kappa, double damping,
                             int one_sided, float* const* new_q, float* const* new_s, float* const* left,
                             float* const* right) {
  for (int64_t k = 0; k < count; ++k) {
    const double by_rows = move_roots(q[k], rows[k], beta, m[k], new_q[k]);
    const double by_columns = move_roots(s[k], columns[k], beta, n[k], new_s[k]);
    const double total = by_rows + by_columns, mean = by_columns / std::max<int64_t>(n[k], 1);
    bounded_inverses(new_q[k], m[k], kappa, std::sqrt(total / 2 * corrections[k]), 0, 0, one_sided, left[k]);
    bounded_inverses(new_s[k], n[k], kappa, 1.0, damping, mean, one_sided, right[k]);
  }
}

}  // extern "C"
