// Variant P's pass over gradients, R_i = sum_j g_ij^2 and C_j = sum_i g_ij^2 in one read, and the factors that follow.
// In float64 throughout: squares of float32 numbers always fit, and the pass still waits for memory.

#include "common.h"

namespace {

constexpr int64_t kRows = 8;         // rows that threads share: fewer loads and stores of the column sums
constexpr int64_t kShort = 2048;     // columns whose sums leave room in the first-level cache
constexpr int64_t kAlone = 1 << 14;  // elements below which one thread is faster than two

// Adds the squares of some rows to `columns`, and stores their sums; as many at `next` are fetched meanwhile, if any.
template <int kCount, bool kNext>
void take(const float* g, int64_t n, const float* next, double* rows, double* columns) {
  Wide sums[kCount] = {}, others[kCount] = {};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    if (kNext) fetch_rows<kCount>(next, j);
    Wide first = load(columns + j), second = load(columns + j + kDoubles);
    for (int64_t r = 0; r < kCount; ++r) {
      const Wide x = load_wide(g + r * n + j), y = load_wide(g + r * n + j + kDoubles);
      sums[r] += x * x, others[r] += y * y;
      first += x * x, second += y * y;
    }
    store(columns + j, first), store(columns + j + kDoubles, second);
  }
  for (int64_t r = 0; r < kCount; ++r) rows[r] = total(sums[r] + others[r]);
  for (; j < n; ++j)
    for (int64_t r = 0; r < kCount; ++r) {
      const double x = g[r * n + j];
      rows[r] += x * x, columns[j] += x * x;
    }
}

void take_one(const float* g, int64_t n, double* row, double* columns) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    const double x = g[j];
    sum += x * x;
    columns[j] += x * x;
  }
  *row = sum;
}

void take_rows(const float* g, Range own, int64_t n, double* rows, double* columns) {
  int64_t i = own.begin;
  // Column sums that come from the second-level cache are worth fewer visits; the hardware follows eight rows.
  for (; n > kShort && i + 8 <= own.end; i += 8) take<8, false>(g + i * n, n, nullptr, rows + i, columns);
  for (; i + 4 <= own.end; i += 4) {
    const float* const four = g + i * n;
    take<4, true>(four, n, i + 8 <= own.end ? four + 4 * n : four, rows + i, columns);
  }
  for (; i < own.end; ++i) take_one(g + i * n, n, rows + i, columns);
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

// factor_i = scale / root_i within kappa of the lower median of its like; zero where the root is.
void bounded_inverses(const float* roots, int64_t count, double kappa, double scale, float* factors) {
  std::vector<float> alive;
  alive.reserve(count);
  for (int64_t i = 0; i < count; ++i)
    if (roots[i] >= kTiny) alive.push_back(roots[i]);
  double low = 0, high = 0;
  if (!alive.empty()) {
    // The lower median of the inverses is the upper one of the roots.
    const auto middle = alive.begin() + alive.size() / 2;
    std::nth_element(alive.begin(), middle, alive.end());
    low = *middle / kappa, high = *middle * kappa;
  }
  for (int64_t i = 0; i < count; ++i) {
    const double root = roots[i];
    // NaN stays NaN: std::max and std::min would hide it.
    const double bounded = root < low ? low : root > high ? high : root;
    factors[i] = static_cast<float>(root < kTiny ? 0.0 * scale : scale / bounded);
  }
}

}  // namespace

extern "C" {

// Row and column sums of squares of several m x n matrices, which the threads take without waiting in between.
void neurms_square_sums(int64_t count, const float* const* g, const int64_t* m, const int64_t* n, double* const* rows,
                        double* const* columns, int threads) {
  int64_t elements = 0, width = 0;
  for (int64_t k = 0; k < count; ++k) elements += m[k] * n[k], width += n[k];
  const int size = elements < kAlone ? 1 : threads;
  std::vector<double> totals(static_cast<size_t>(width) * size);
#pragma omp parallel num_threads(size)
  {
    const int part = omp_get_thread_num(), parts = omp_get_num_threads();
    double* mine = totals.data() + static_cast<size_t>(width) * part;
    for (int64_t k = 0; k < count; mine += n[k++])
      take_rows(g[k], share(m[k], part, parts, kRows), n[k], rows[k], mine);
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

// One more column for each of several matrices, a null pointer for one of zeros: its squares are added to the sums of the
// rows, and up. A matrix that has no such column has a null pointer for its sum.
void neurms_column_squares(int64_t count, const float* const* g, const int64_t* m, double* const* rows,
                           double* const* sums) {
  for (int64_t k = 0; k < count; ++k) {
    double sum = 0;
    if (g[k] != nullptr) {
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < m[k]; ++i) {
        const double x = g[k][i];
        rows[k][i] += x * x;
        sum += x * x;
      }
    }
    if (sums[k] != nullptr) *sums[k] = sum;
  }
}

// The roots q (m) and s (n) of several matrices' averages moved towards the sums, and the factors that they then give.
void neurms_gradient_factors(int64_t count, const double* const* rows, const double* const* columns,
                             const float* const* q, const float* const* s, const int64_t* m, const int64_t* n,
                             const double* corrections, double beta, double kappa, float* const* new_q,
                             float* const* new_s, float* const* left, float* const* right) {
  for (int64_t k = 0; k < count; ++k) {
    const double total =
        move_roots(q[k], rows[k], beta, m[k], new_q[k]) + move_roots(s[k], columns[k], beta, n[k], new_s[k]);
    bounded_inverses(new_q[k], m[k], kappa, std::sqrt(total / 2 * corrections[k]), left[k]);
    bounded_inverses(new_s[k], n[k], kappa, 1.0, right[k]);
  }
}

}  // extern "C"
