// The products of D^T H with k probes from both sides, one pass over D and H: while a row of both is in cache, H z and
// D y of it, and then its part of D^T (H z) and H^T (D y). The specification is neurms/compiled/probes.py.

#include "common.h"

namespace {

constexpr int64_t kRows = 4;         // rows taken together: fewer loads and stores of the sums
constexpr int64_t kAlone = 1 << 15;  // elements of D and H below which one thread is faster than two

// One of the two signals, (rows, size), with its probes, k rows of `size`, and the sums that it enters, k rows of `size`.
struct Side {
  const float* x;
  int64_t size;
  const float* probes;
  float* sums;

  const float* row(int64_t i) const { return x + i * size; }
};

// out[k] = <x, probe_k>.
void project(const float* x, const float* probes, int64_t size, int64_t k, float* out) {
  int64_t p = 0;
  for (; p + 4 <= k; p += 4) {
    const float *y = probes + p * size, *z = y + size, *v = z + size, *w = v + size;
    float a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
    for (int64_t j = 0; j < size; ++j) a += x[j] * y[j], b += x[j] * z[j], c += x[j] * v[j], d += x[j] * w[j];
    out[p] = a, out[p + 1] = b, out[p + 2] = c, out[p + 3] = d;
  }
  for (; p < k; ++p) {
    const float* y = probes + p * size;
    float a = 0;
#pragma omp simd reduction(+ : a)
    for (int64_t j = 0; j < size; ++j) a += x[j] * y[j];
    out[p] = a;
  }
}

// sums_k += sum over kRows rows of weights[row][k] x_row; where there are fewer rows, weights beyond them are zero.
void gather(const Side& side, int64_t i, int64_t count, const float* weights, int64_t k) {
  const float *a = side.row(i), *b = side.row(i + std::min<int64_t>(1, count - 1)),
              *c = side.row(i + std::min<int64_t>(2, count - 1)), *d = side.row(i + count - 1);
  for (int64_t p = 0; p < k; ++p) {
    const float s = weights[p], t = weights[k + p], u = weights[2 * k + p], v = weights[3 * k + p];
    float* sums = side.sums + p * side.size;
#pragma omp simd
    for (int64_t j = 0; j < side.size; ++j) sums[j] += (s * a[j] + t * b[j]) + (u * c[j] + v * d[j]);
  }
}

// Rows of both signals. `offset` (k) is what a column of ones beside H adds to H z; `back` gets the sums of D y.
void take(const Side& errors, const Side& inputs, Range own, int64_t k, const float* offset, float* back) {
  std::vector<float> seen(kRows * k), into(kRows * k);
  for (int64_t i = own.begin; i < own.end; i += kRows) {
    const int64_t count = std::min(kRows, own.end - i);
    std::fill(seen.begin(), seen.end(), 0.0f), std::fill(into.begin(), into.end(), 0.0f);
    for (int64_t r = 0; r < count; ++r) {
      project(inputs.row(i + r), inputs.probes, inputs.size, k, &seen[r * k]);
      project(errors.row(i + r), errors.probes, errors.size, k, &into[r * k]);
      for (int64_t p = 0; p < k; ++p) back[p] += into[r * k + p];
      if (offset)
        for (int64_t p = 0; p < k; ++p) seen[r * k + p] += offset[p];
    }
    // Rows that are not there have weight zero, and stand for the last one that is.
    gather(errors, i, count, seen.data(), k);
    gather(inputs, i, count, into.data(), k);
  }
}

// (size, k) -> k rows of `size`.
void turn(const float* x, int64_t size, int64_t k, float* turned) {
  for (int64_t j = 0; j < size; ++j)
    for (int64_t p = 0; p < k; ++p) turned[p * size + j] = x[j * k + p];
}

// The sums of all threads, k rows of `size` each, as (size, k).
void collect(const std::vector<std::vector<float>>& sums, int64_t first, int64_t size, int64_t k, float* out) {
  for (int64_t j = 0; j < size; ++j)
    for (int64_t p = 0; p < k; ++p) {
      float total = 0;
      for (const auto& own : sums)
        if (!own.empty()) total += own[first + p * size + j];
      out[j * k + p] = total;
    }
}

}  // namespace

extern "C" {

// G z (m, k) and G^T y (n, or n + 1 with `ones`, k) for G = D^T H; with `ones` H has a column of ones beside it.
void neurms_probe_products(const float* errors, const float* activations, int64_t rows, int64_t m, int64_t n,
                           const float* right, const float* left, int64_t k, int ones, float* forth, float* back,
                           int threads) {
  std::vector<float> probes(static_cast<size_t>(k) * (m + n));
  float* by_errors = probes.data() + k * n;
  turn(right, n, k, probes.data());
  turn(left, m, k, by_errors);
  const int size = rows * (m + n) < kAlone ? 1 : threads;
  // Of a thread: what enters G z, what enters G^T y, and the sums of D y.
  std::vector<std::vector<float>> sums(size);
#pragma omp parallel num_threads(size)
  {
    auto& own = sums[omp_get_thread_num()];
    own.assign(static_cast<size_t>(k) * (m + n + 1), 0.0f);
    const Side d{errors, m, by_errors, own.data()}, h{activations, n, probes.data(), own.data() + k * m};
    take(d, h, share(rows, omp_get_thread_num(), omp_get_num_threads(), kRows), k, ones ? right + n * k : nullptr,
         own.data() + k * (m + n));
  }
  collect(sums, 0, m, k, forth);
  collect(sums, k * m, n, k, back);
  if (ones) collect(sums, k * (m + n), 1, k, back + n * k);
}

}  // extern "C"
