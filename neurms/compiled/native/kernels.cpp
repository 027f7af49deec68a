// Passes over a matrix that torch's own loops cannot fuse: several rows at a time, one read of each
// operand, per-thread column sums. Plain C interface, contiguous row-major float32, no torch headers, so
// that a build takes a second. The eager definitions in neurms/compiled/fused.py are the specification.
//
// Floating point: no -ffast-math (it would flush denormals in the whole process, for everybody);
// `omp simd reduction` is what allows sums to be vectorised.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include <omp.h>

namespace {

constexpr int64_t kRows = 4;       // rows taken together: fewer loads and stores of the column sums
constexpr int64_t kFlush = 64;     // rows summed in float32 before they enter the float64 totals
constexpr int64_t kChunk = 2048;   // columns summed in float32 before they enter a float64 total
constexpr float kTiny = 1.17549435e-38f;

struct Range {
  int64_t begin, end;
};

Range share(int64_t count, int part, int parts, int64_t multiple) {
  const int64_t blocks = (count + multiple - 1) / multiple;
  const int64_t first = blocks * part / parts, last = blocks * (part + 1) / parts;
  return {std::min(first * multiple, count), std::min(last * multiple, count)};
}

float dot_squares(const float* g, const float* s, int64_t n) {
  double total = 0;
  for (int64_t chunk = 0; chunk < n; chunk += kChunk) {
    const int64_t end = std::min(n, chunk + kChunk);
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = chunk; j < end; ++j) sum += g[j] * g[j] * s[j];
    total += sum;
  }
  return static_cast<float>(total);
}

void add_squares(const float* g, float q, float* out, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) out[j] += g[j] * g[j] * q;
}

void add_squares4(const float* g, const float* q, float* out, int64_t n) {
  const float *a = g, *b = g + n, *c = g + 2 * n, *d = g + 3 * n;
  const float qa = q[0], qb = q[1], qc = q[2], qd = q[3];
#pragma omp simd
  for (int64_t j = 0; j < n; ++j)
    out[j] += a[j] * a[j] * qa + b[j] * b[j] * qb + c[j] * c[j] * qc + d[j] * d[j] * qd;
}

void dot_squares4(const float* g, const float* s, float* out, int64_t n) {
  const float *a = g, *b = g + n, *c = g + 2 * n, *d = g + 3 * n;
  double total[kRows] = {0, 0, 0, 0};
  for (int64_t chunk = 0; chunk < n; chunk += kChunk) {
    const int64_t end = std::min(n, chunk + kChunk);
    float sa = 0, sb = 0, sc = 0, sd = 0;
#pragma omp simd reduction(+ : sa, sb, sc, sd)
    for (int64_t j = chunk; j < end; ++j) {
      const float w = s[j];
      sa += a[j] * a[j] * w;
      sb += b[j] * b[j] * w;
      sc += c[j] * c[j] * w;
      sd += d[j] * d[j] * w;
    }
    total[0] += sa;
    total[1] += sb;
    total[2] += sc;
    total[3] += sd;
  }
  for (int r = 0; r < kRows; ++r) out[r] = static_cast<float>(total[r]);
}

// One pass over G. With `unit` null (the first half: q = 1) only the column sums are formed; else
// q_i = factor * sum_j g_ij^2 unit_j first, and the columns are weighted by it while the rows are in cache.
void pass(const float* g, int64_t m, int64_t n, const float* unit, float factor, float* q,
          double* columns, std::vector<double>& scratch, int threads) {
  scratch.assign(static_cast<size_t>(n) * threads, 0.0);
#pragma omp parallel num_threads(threads)
  {
    const int id = omp_get_thread_num();
    double* totals = scratch.data() + static_cast<size_t>(n) * id;
    std::vector<float> sums(n, 0.0f);
    const Range rows = share(m, id, threads, kRows);
    int64_t pending = 0;
    auto flush = [&]() {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) totals[j] += sums[j];
      std::fill(sums.begin(), sums.end(), 0.0f);
      pending = 0;
    };
    float weight[kRows] = {1.0f, 1.0f, 1.0f, 1.0f};
    for (int64_t i = rows.begin; i < rows.end; i += kRows) {
      const float* block = g + i * n;
      const int64_t count = std::min(kRows, rows.end - i);
      if (count == kRows) {
        if (unit) dot_squares4(block, unit, weight, n);
      } else if (unit) {
        for (int64_t r = 0; r < count; ++r) weight[r] = dot_squares(block + r * n, unit, n);
      }
      if (unit)
        for (int64_t r = 0; r < count; ++r) q[i + r] = weight[r] = weight[r] * factor;
      if (columns) {
        if (count == kRows)
          add_squares4(block, weight, sums.data(), n);
        else
          for (int64_t r = 0; r < count; ++r) add_squares(block + r * n, weight[r], sums.data(), n);
        pending += count;
        if (pending >= kFlush) flush();
      }
    }
    if (columns) flush();
  }
  if (!columns) return;
  for (int64_t j = 0; j < n; ++j) {
    double total = 0;
    for (int t = 0; t < threads; ++t) total += scratch[static_cast<size_t>(n) * t + j];
    columns[j] = total;
  }
}

}  // namespace

extern "C" {

int neurms_abi() { return 1; }

// Whether every element is finite: one read, no branch in the loop. x - x is 0 or NaN.
int neurms_all_finite(const float* x, int64_t count, int threads) {
  int bad = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : bad) if (count > 65536)
  for (int64_t block = 0; block < count; block += 16384) {
    const int64_t end = std::min(count, block + 16384);
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = block; i < end; ++i) sum += x[i] - x[i];
    bad |= !(sum == 0.0f);
  }
  return !bad;
}

// Power iteration for q s^T ~ G.^2 from q = 1; stops when q has settled to `tolerance`. Returns rounds.
int neurms_two_sided_fit(const float* g, int64_t m, int64_t n, int iterations, float tolerance, float* q,
                         float* s, int threads) {
  std::vector<double> columns(n), scratch;
  std::vector<float> unit(n), last(m, 0.0f);
  pass(g, m, n, nullptr, 1.0f, nullptr, columns.data(), scratch, threads);
  double weight = static_cast<double>(m);  // ||q||^2 for q = 1
  int round = 0;
  while (true) {
    ++round;
    double peak = kTiny, squares = 0;
    for (int64_t j = 0; j < n; ++j) {
      s[j] = static_cast<float>(columns[j] / std::max(weight, static_cast<double>(kTiny)));
      peak = std::max(peak, static_cast<double>(s[j]));
    }
    for (int64_t j = 0; j < n; ++j) {
      unit[j] = static_cast<float>(s[j] / peak);
      squares += static_cast<double>(unit[j]) * unit[j];
    }
    const float factor = static_cast<float>(1.0 / std::max(squares * peak, static_cast<double>(kTiny)));
    const bool final_round = round == iterations;
    pass(g, m, n, unit.data(), factor, q, final_round ? nullptr : columns.data(), scratch, threads);
    if (final_round) return round;
    weight = 0;
    double change = 0;
    for (int64_t i = 0; i < m; ++i) {
      weight += static_cast<double>(q[i]) * q[i];
      change = std::max(change, std::abs(static_cast<double>(q[i]) - last[i]));
      last[i] = q[i];
    }
    // q's scale is fixed by the fit, so its largest entry says how large a change is.
    const double top = m ? *std::max_element(q, q + m) : 0.0;
    if (change <= tolerance * top) return round;
  }
}

// The same for a G that is stored by columns: `a` is its transpose, n x m and row-major. A round is one pass
// again: rows of a give s, and while they are in cache their sum gives the next q. The first pass only finds the
// magnitude of s, so that sums of a^2 s stay within float32.
int neurms_two_sided_fit_transposed(const float* a, int64_t n, int64_t m, int iterations, float tolerance,
                                    float* q, float* s, int threads) {
  std::vector<double> columns(m), scratch;
  std::vector<float> unit(m, 1.0f), last(m, 0.0f);
  double factor = 1.0 / std::max(static_cast<double>(m), 1.0);
  pass(a, n, m, unit.data(), static_cast<float>(factor), s, nullptr, scratch, threads);
  double peak = kTiny;
  for (int64_t i = 0; i < n; ++i) peak = std::max(peak, static_cast<double>(s[i]));
  int round = 0;
  while (true) {
    ++round;
    pass(a, n, m, unit.data(), static_cast<float>(factor / peak), s, columns.data(), scratch, threads);
    double squares = 0, weight = 0, change = 0, top = 0;
    for (int64_t i = 0; i < n; ++i) squares += static_cast<double>(s[i]) * s[i];
    const double divisor = std::max(squares * peak, static_cast<double>(kTiny));
    for (int64_t j = 0; j < m; ++j) {
      q[j] = static_cast<float>(columns[j] / divisor);
      weight += static_cast<double>(q[j]) * q[j];
      change = std::max(change, std::abs(static_cast<double>(q[j]) - last[j]));
      top = std::max(top, static_cast<double>(q[j]));
      last[j] = unit[j] = q[j];
    }
    if (round == iterations || change <= tolerance * top) {
      for (int64_t i = 0; i < n; ++i) s[i] = static_cast<float>(s[i] * peak);
      return round;
    }
    factor = 1.0 / std::max(weight, static_cast<double>(kTiny));
  }
}

// sum_ij (left_i g_ij right_j)^2
double neurms_scaled_square_sum(const float* g, int64_t m, int64_t n, const float* left,
                                const float* right, int threads) {
  std::vector<float> right2(n);
  for (int64_t j = 0; j < n; ++j) right2[j] = right[j] * right[j];
  double total = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : total)
  for (int64_t i = 0; i < m; ++i) {
    const double l = left[i];
    total += l * l * dot_squares(g + i * n, right2.data(), n);
  }
  return total;
}

// W <- decay W - step left_i g_ij right_j
void neurms_scaled_update(float* w, const float* g, int64_t m, int64_t n, const float* left,
                          const float* right, float step, float decay, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < m; ++i) {
    const float l = left[i] * step;
    float* wi = w + i * n;
    const float* gi = g + i * n;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) wi[j] = decay * wi[j] - l * gi[j] * right[j];
  }
}

// M <- mu M + (1 - mu) G; R = M or, Nesterov, (1 - mu) G + mu M; W_i <- decay W_i - step R_i / max(||R_i||, floor)
void neurms_row_normalized_update(float* w, float* momentum, const float* g, int64_t m, int64_t n, float mu,
                                  int nesterov, float step, float decay, float floor, int threads) {
  const float fresh = 1.0f - mu, a = nesterov ? fresh : 0.0f, b = nesterov ? mu : 1.0f;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < m; ++i) {
    float* wi = w + i * n;
    float* mi = momentum + i * n;
    const float* gi = g + i * n;
    double squares = 0;
    for (int64_t chunk = 0; chunk < n; chunk += kChunk) {
      const int64_t end = std::min(n, chunk + kChunk);
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = chunk; j < end; ++j) {
        const float v = mi[j] + fresh * (gi[j] - mi[j]);
        mi[j] = v;
        const float r = a * gi[j] + b * v;
        sum += r * r;
      }
      squares += sum;
    }
    float scale = step / std::max(static_cast<float>(std::sqrt(squares)), floor);
    if (squares < 1e-30 || !std::isfinite(squares)) {
      // Squares have under- or overflowed: the norm again, through the largest entry.
      float peak = 0;
      for (int64_t j = 0; j < n; ++j) peak = std::max(peak, std::fabs(a * gi[j] + b * mi[j]));
      double exact = 0;
      for (int64_t j = 0; j < n && peak > 0; ++j) {
        const double r = static_cast<double>(a * gi[j] + b * mi[j]) / peak;
        exact += r * r;
      }
      scale = step / std::max(static_cast<float>(std::sqrt(exact) * peak), floor);
    }
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) wi[j] = decay * wi[j] - scale * (a * gi[j] + b * mi[j]);
  }
}

}  // extern "C"
