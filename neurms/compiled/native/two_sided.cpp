// RACS's passes over G: the rank-one fit q s^T ~ G.^2 by power iteration, the norm of the update that it scales, and
// the update. Several rows at a time, one read of each element, column sums for each thread.

#include "common.h"

namespace {

constexpr int64_t kRows = 4;      // rows taken together: fewer loads and stores of the column sums
constexpr int64_t kFlush = 64;    // rows summed in float32 before they enter the float64 totals
constexpr int64_t kChunk = 2048;  // columns summed in float32 before they enter a float64 total, full lines

// out_r = sum_j g_rj^2 s_j and, with kAlso, more_r = sum_j g_rj^2 also_j, for each of kCount rows. The rows `ahead` of
// these are fetched meanwhile, which the hardware does not do across pages.
template <int kCount, bool kAlso>
void dot_squares(const float* g, const float* s, const float* also, float* out, float* more, int64_t n,
                 int64_t ahead) {
  double first[kCount] = {0}, second[kCount] = {0};
  int64_t j = 0;
  while (j + kLanes <= n) {
    const int64_t end = std::min(n, j + kChunk);
    Lanes a[kCount] = {}, b[kCount] = {};
    for (; j + kLanes <= end; j += kLanes) {
      const Lanes weight = load(s + j), other = kAlso ? load(also + j) : weight;
      for (int r = 0; r < kCount; ++r) {
        __builtin_prefetch(g + r * n + ahead + j);
        const Lanes x = load(g + r * n + j), square = x * x;
        a[r] += square * weight;
        if (kAlso) b[r] += square * other;
      }
    }
    for (int r = 0; r < kCount; ++r) first[r] += total(a[r]), second[r] += total(b[r]);
  }
  for (; j < n; ++j)
    for (int r = 0; r < kCount; ++r) {
      const float square = g[r * n + j] * g[r * n + j];
      first[r] += square * s[j];
      if (kAlso) second[r] += square * also[j];
    }
  for (int r = 0; r < kCount; ++r) {
    out[r] = static_cast<float>(first[r]);
    if (kAlso) more[r] = static_cast<float>(second[r]);
  }
}

template <int kCount>
void add_squares(const float* g, const float* q, float* sums, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    float sum = sums[j];
    for (int r = 0; r < kCount; ++r) sum += g[r * n + j] * g[r * n + j] * q[r];
    sums[j] = sum;
  }
}

// What one pass over G is to compute; null is what it need not.
struct Pass {
  const float* unit = nullptr;  // (n): q_i = factor * sum_j g_ij^2 unit_j. Without it q_i = 1 throughout.
  const float* also = nullptr;  // (n): more_i = sum_j g_ij^2 also_j
  float factor = 1.0f;
  float* q = nullptr;
  float* more = nullptr;
  double* columns = nullptr;  // (n): sum_i g_ij^2 q_i, while the rows are in cache
};

template <int kCount>
void take_rows(const Pass& pass, const float* g, int64_t i, int64_t n, int64_t ahead, float* sums) {
  float q[kCount], more[kCount];
  std::fill(q, q + kCount, 1.0f);
  if (pass.unit) {
    if (pass.also)
      dot_squares<kCount, true>(g, pass.unit, pass.also, q, more, n, ahead);
    else
      dot_squares<kCount, false>(g, pass.unit, nullptr, q, more, n, ahead);
    for (int r = 0; r < kCount; ++r) {
      pass.q[i + r] = q[r] *= pass.factor;
      if (pass.also) pass.more[i + r] = more[r];
    }
  }
  if (sums) add_squares<kCount>(g, q, sums, n);
}

void run(const Pass& pass, const float* g, int64_t m, int64_t n, std::vector<double>& scratch, int threads) {
  scratch.assign(static_cast<size_t>(n) * threads, 0.0);
#pragma omp parallel num_threads(threads)
  {
    const int id = omp_get_thread_num();
    double* totals = scratch.data() + static_cast<size_t>(n) * id;
    std::vector<float> sums(pass.columns ? n : 0, 0.0f);
    float* own = pass.columns ? sums.data() : nullptr;
    const Range rows = share(m, id, omp_get_num_threads(), kRows);
    int64_t pending = 0;
    for (int64_t i = rows.begin; i < rows.end;) {
      const bool full = i + kRows <= rows.end;
      const int64_t ahead = i + 2 * kRows <= rows.end ? kRows * n : 0;
      if (full)
        take_rows<kRows>(pass, g + i * n, i, n, ahead, own);
      else
        take_rows<1>(pass, g + i * n, i, n, 0, own);
      i += full ? kRows : 1;
      pending += full ? kRows : 1;
      if (own && (pending >= kFlush || i == rows.end)) {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) totals[j] += own[j], own[j] = 0.0f;
        pending = 0;
      }
    }
  }
  if (!pass.columns) return;
  for (int64_t j = 0; j < n; ++j) {
    double total = 0;
    for (int t = 0; t < threads; ++t) total += scratch[static_cast<size_t>(n) * t + j];
    pass.columns[j] = total;
  }
}

// Power iteration with a positive matrix brings two positive vectors nearer, in the largest relative difference of
// their entries, with every round (Birkhoff). So the change of one round bounds that of every later one, and two in
// a row show the rate at which they shrink: what is left after this change is about the change times that rate.
class Settling {
 public:
  explicit Settling(float tolerance) : tolerance_(tolerance) {}

  bool settled(const float* now, const float* before, int64_t n) {
    double change = 0;
    for (int64_t j = 0; j < n; ++j)
      if (now[j] != before[j])
        change = std::max(change, std::abs(static_cast<double>(now[j]) - before[j]) / std::max(now[j], before[j]));
    const double rate = last_ > 0 ? change / last_ : 1.0;
    last_ = change;
    const bool shrinking = rate < 0.01 && 2 * change * std::sqrt(rate) <= tolerance_;
    return change <= tolerance_ || (change <= 10 * tolerance_ && shrinking);
  }

 private:
  double tolerance_, last_ = 0;
};

// The averages of q and s as they would be after this round, and the factors made of them.
struct Average {
  const float* old;
  float fresh;

  // From the nearer end: with a weight of 1 the old value must leave no rounding error behind.
  float operator()(int64_t i, float value) const {
    const float step = value - old[i];
    return fresh < 0.5f ? old[i] + fresh * step : value - (1.0f - fresh) * step;
  }
};

float inverse_root(float value) { return value > 0 ? 1.0f / std::sqrt(value) : 0.0f; }

// From q = 1; returns the number of rounds. With `average` (that of s), `energy` becomes sum_j g_ij^2 / s_j for the s
// of the last round, averaged; it comes out of the same passes.
int fit(const float* g, int64_t m, int64_t n, int iterations, float tolerance, float* q, float* s,
        const Average* average, float* energy, int threads) {
  std::vector<double> columns(n), scratch;
  std::vector<float> unit(n), last(n), also(average ? n : 0);
  Settling settling(tolerance);
  Pass pass;
  pass.columns = columns.data();
  run(pass, g, m, n, scratch, threads);
  double weight = static_cast<double>(m);  // ||q||^2 for q = 1
  pass.unit = unit.data();
  pass.also = average ? also.data() : nullptr;
  pass.q = q;
  pass.more = energy;
  for (int round = 1;; ++round) {
    double peak = kTiny, squares = 0;
    for (int64_t j = 0; j < n; ++j) {
      last[j] = s[j];
      s[j] = static_cast<float>(columns[j] / std::max(weight, static_cast<double>(kTiny)));
      peak = std::max(peak, static_cast<double>(s[j]));
    }
    if (round > 1 && settling.settled(s, last.data(), n)) return round - 1;
    for (int64_t j = 0; j < n; ++j) {
      unit[j] = static_cast<float>(s[j] / peak);
      squares += static_cast<double>(unit[j]) * unit[j];
      if (average) also[j] = 1.0f / std::max((*average)(j, s[j]), kTiny);
    }
    pass.factor = static_cast<float>(1.0 / std::max(squares * peak, static_cast<double>(kTiny)));
    if (round == iterations) pass.columns = nullptr;
    run(pass, g, m, n, scratch, threads);
    if (round == iterations) return round;
    weight = 0;
    for (int64_t i = 0; i < m; ++i) weight += static_cast<double>(q[i]) * q[i];
  }
}

// The same for a G that is stored by columns: `a` is its transpose, n x m and row-major. A round is one pass again:
// rows of a give s, and while they are in cache their sum gives the next q. The first pass only finds the magnitude
// of s, so that sums of a^2 s stay within float32.
int fit_transposed(const float* a, int64_t n, int64_t m, int iterations, float tolerance, float* q, float* s,
                   int threads) {
  std::vector<double> columns(m), scratch;
  std::vector<float> unit(m, 1.0f), last(m, 0.0f);
  Settling settling(tolerance);
  double factor = 1.0 / std::max(static_cast<double>(m), 1.0);
  Pass pass;
  pass.unit = unit.data();
  pass.q = s;
  pass.factor = static_cast<float>(factor);
  run(pass, a, n, m, scratch, threads);
  double peak = kTiny;
  for (int64_t i = 0; i < n; ++i) peak = std::max(peak, static_cast<double>(s[i]));
  pass.columns = columns.data();
  for (int round = 1;; ++round) {
    pass.factor = static_cast<float>(factor / peak);
    run(pass, a, n, m, scratch, threads);
    double squares = 0, weight = 0;
    for (int64_t i = 0; i < n; ++i) squares += static_cast<double>(s[i]) * s[i];
    const double divisor = std::max(squares * peak, static_cast<double>(kTiny));
    for (int64_t j = 0; j < m; ++j) {
      q[j] = static_cast<float>(columns[j] / divisor);
      weight += static_cast<double>(q[j]) * q[j];
      unit[j] = q[j];
    }
    if (settling.settled(q, last.data(), m) || round == iterations) {
      for (int64_t i = 0; i < n; ++i) s[i] = static_cast<float>(s[i] * peak);
      return round;
    }
    std::copy(q, q + m, last.begin());
    factor = 1.0 / std::max(weight, static_cast<double>(kTiny));
  }
}

double square_sum(const float* g, int64_t m, int64_t n, const float* left, const float* right, int threads) {
  std::vector<float> right2(n);
  for (int64_t j = 0; j < n; ++j) right2[j] = right[j] * right[j];
  double sum = 0;
#pragma omp parallel num_threads(threads) reduction(+ : sum)
  {
    const Range rows = share(m, omp_get_thread_num(), omp_get_num_threads(), kRows);
    float sums[kRows];
    for (int64_t i = rows.begin; i < rows.end;) {
      const bool full = i + kRows <= rows.end;
      const int64_t ahead = i + 2 * kRows <= rows.end ? kRows * n : 0;
      if (full)
        dot_squares<kRows, false>(g + i * n, right2.data(), nullptr, sums, nullptr, n, ahead);
      else
        dot_squares<1, false>(g + i * n, right2.data(), nullptr, sums, nullptr, n, 0);
      for (int64_t r = 0; r < (full ? kRows : 1); ++r) sum += static_cast<double>(left[i + r]) * left[i + r] * sums[r];
      i += full ? kRows : 1;
    }
  }
  return sum;
}

// Elements of a matrix that one thread takes alone.
constexpr int64_t kAlone = 1 << 15;

struct Averages {
  Average q, s;
  float correction;
};

// By rows no pass is spent on the norm: the fit's last one has the sums that it needs.
double scales(const float* g, int64_t m, int64_t n, bool turned, int iterations, float tolerance,
              const Averages& averages, float* q, float* s, float* left, float* right, int threads) {
  std::vector<float> energy(turned ? 0 : m);
  if (turned)
    fit_transposed(g, n, m, iterations, tolerance, q, s, threads);
  else
    fit(g, m, n, iterations, tolerance, q, s, &averages.s, energy.data(), threads);
  for (int64_t i = 0; i < m; ++i) left[i] = averages.correction * inverse_root(q[i] = averages.q(i, q[i]));
  for (int64_t j = 0; j < n; ++j) right[j] = inverse_root(s[j] = averages.s(j, s[j]));
  if (turned) return std::sqrt(square_sum(g, n, m, right, left, threads));
  double total = 0;
  for (int64_t i = 0; i < m; ++i) total += static_cast<double>(left[i]) * left[i] * energy[i];
  return std::sqrt(total);
}

}  // namespace

extern "C" {

// Power iteration for q s^T ~ G.^2 from q = 1; stops when it has settled to `tolerance`. Returns rounds.
int neurms_two_sided_fit(const float* g, int64_t m, int64_t n, int iterations, float tolerance, float* q, float* s,
                         int threads) {
  return fit(g, m, n, iterations, tolerance, q, s, nullptr, nullptr, threads);
}

int neurms_two_sided_fit_transposed(const float* a, int64_t n, int64_t m, int iterations, float tolerance, float* q,
                                    float* s, int threads) {
  return fit_transposed(a, n, m, iterations, tolerance, q, s, threads);
}

// Of several matrices, where averages q and s move towards G's fit, left = correction / sqrt(q') and right = 1 /
// sqrt(s') there, and ||left_i g_ij right_j||.
void neurms_two_sided_scales(int64_t count, const float* const* g, const int64_t* m, const int64_t* n,
                             const int64_t* turned, int iterations, float tolerance, float fresh,
                             const float* corrections, const float* const* q, const float* const* s,
                             float* const* new_q, float* const* new_s, float* const* left, float* const* right,
                             double* norms, int threads) {
  for (int64_t k = 0; k < count; ++k) {
    const Averages averages{{q[k], fresh}, {s[k], fresh}, corrections[k]};
    // Threads would wait for each other longer than one of them works.
    const int own = m[k] * n[k] < kAlone ? 1 : threads;
    norms[k] = scales(g[k], m[k], n[k], turned[k], iterations, tolerance, averages, new_q[k], new_s[k], left[k],
                      right[k], own);
  }
}

// sum_ij (left_i g_ij right_j)^2
double neurms_scaled_square_sum(const float* g, int64_t m, int64_t n, const float* left, const float* right,
                                int threads) {
  return square_sum(g, m, n, left, right, threads);
}

}  // extern "C"
