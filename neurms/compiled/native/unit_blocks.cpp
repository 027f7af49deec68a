// SharedBasis's work on each unit, in one visit of its k x k block: the block turned into the new basis, the smallest
// eigenvalue, the norm of what is left out, and the inverse root of the result times the unit's gradient.
//
// No eigenvectors: a block is reduced to a tridiagonal one by Householder reflections, whose QL iteration, for 16 units
// at a time, turns the unit's vector along; the rotations are kept to turn the result back. Everything but that
// iteration, whose chains of roots and divisions need the 16 units to fill the processor, is one unit after the other.

#include "tridiagonal.h"

#include <memory>

namespace {

constexpr int kStep = static_cast<int>(kLine / kLanes);  // registers of 16 floats: k is filled up to a multiple of 16
// Registers with sums of rows that are kept at a time; AVX-512 has 32 of them, others 16.
constexpr int kHeld = kLanes == kLine ? 8 : 4;

// The most of `lines` registers, up to `most`, that go into them without a rest.
constexpr int part_of(int lines, int most) { return lines % most == 0 ? most : part_of(lines, most - 1); }

constexpr double kUlp = 1.1920928955078125e-07;  // of float32
constexpr float kVanishing = 0x1p-60f;           // of the square of a matrix's largest entry

inline float lane_sum(const Lanes& lanes) {
  float part[kLanes];
  store(part, lanes);
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half; ++l) part[l] += part[l + half];
  return part[0];
}

// out = sum_i x_i row_i for `count` rows of kLines registers, `stride` floats apart.
template <int kLines>
inline void combine(const float* x, const float* rows, int64_t count, int64_t stride, float* out) {
  constexpr int kPart = part_of(kLines, kHeld);
  for (int first = 0; first < kLines; first += kPart, rows += kPart * kLanes, out += kPart * kLanes) {
    Lanes even[kPart] = {}, odd[kPart] = {};
    int64_t i = 0;
    for (; i + 2 <= count; i += 2)
      for (int l = 0; l < kPart; ++l) {
        even[l] += x[i] * load(rows + i * stride + l * kLanes);
        odd[l] += x[i + 1] * load(rows + (i + 1) * stride + l * kLanes);
      }
    if (i < count)
      for (int l = 0; l < kPart; ++l) even[l] += x[i] * load(rows + i * stride + l * kLanes);
    for (int l = 0; l < kPart; ++l) store(out + l * kLanes, even[l] + odd[l]);
  }
}

template <int kLines>
inline float dot(const float* x, const float* y) {
  Lanes sum = {};
  for (int l = 0; l < kLines; ++l) sum += load(x + l * kLanes) * load(y + l * kLanes);
  return lane_sum(sum);
}

// C = A B for k x k matrices in rows of kLines registers; rows of A and C beyond k, up to a multiple of 4, are zero.
template <int kLines>
void multiply(const float* a, const float* b, float* c, int64_t k) {
  constexpr int64_t kWide = kLines * kLanes;
  constexpr int kPart = part_of(kLines, kHeld / 2);
  for (int64_t i = 0; i < k; i += 4)
    for (int64_t first = 0; first < kWide; first += kPart * kLanes) {
      Lanes sums[4][kPart] = {};
      for (int64_t j = 0; j < k; ++j)
        for (int l = 0; l < kPart; ++l) {
          const Lanes row = load(b + j * kWide + first + l * kLanes);
          for (int r = 0; r < 4; ++r) sums[r][l] += a[(i + r) * kWide + j] * row;
        }
      for (int r = 0; r < 4; ++r)
        for (int l = 0; l < kPart; ++l) store(c + (i + r) * kWide + first + l * kLanes, sums[r][l]);
    }
}

// What all units of one matrix share.
template <int kLines>
struct Frame {
  static constexpr int64_t kWide = kLines * kLanes;
  alignas(64) float turn[kWide * kWide] = {};        // T = B'^T B
  alignas(64) float turn_back[kWide * kWide] = {};   // T^T
  alignas(64) float old[2 * kWide * kWide] = {};     // B in the frame that begins with B': (d, k)
  alignas(64) float old_back[2 * kWide * kWide] = {};  // its transpose, in rows of 2 kWide
  int64_t k, d;

  Frame(const float* to_old, int64_t k, int64_t d) : k(k), d(d) {
    for (int64_t i = 0; i < d; ++i)
      for (int64_t j = 0; j < k; ++j) {
        const float x = to_old[i * k + j];
        old[i * kWide + j] = old_back[j * 2 * kWide + i] = x;
        if (i < k) turn[i * kWide + j] = turn_back[j * kWide + i] = x;
      }
  }
};

// A thread's scratch: one unit's matrices, and of each unit of a group what its way back needs.
template <int kLines>
struct Scratch {
  static constexpr int64_t kWide = kLines * kLanes;
  alignas(64) float block[kWide * kWide] = {};
  alignas(64) float product[kWide * kWide] = {};
  alignas(64) float projected[kUnits][kWide * kWide] = {};
  alignas(64) float reflectors[kUnits][kWide * kWide];
  float weights[kUnits][kWide];
  int exponents[kUnits];
  double residual_scales[kUnits];
  Units d[kWide], e[kWide], z[kWide];
  std::vector<double> chain_d, chain_e;  // of the norm's tridiagonal matrices, Units each
  Rotations rotations;
};

// P = (T S T^T + its transpose) / 2 + c c^T, of unit u.
template <int kLines>
void project(const Frame<kLines>& frame, const float* c, int u, Scratch<kLines>& own) {
  constexpr int64_t kWide = kLines * kLanes;
  const int64_t k = frame.k;
  multiply<kLines>(frame.turn, own.block, own.product, k);
  float* p = own.projected[u];
  multiply<kLines>(own.product, frame.turn_back, p, k);
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = 0; j <= i; ++j)
      p[i * kWide + j] = p[j * kWide + i] = 0.5f * (p[i * kWide + j] + p[j * kWide + i]) + c[i] * c[j];
}

// Lanczos for the norm of B S B^T + g g^T - B' (P - shift I) B'^T, in the frame: writes the tridiagonal matrix as unit
// u's, and takes the shift off P.
template <int kLines>
void residual_chain(const Frame<kLines>& frame, const float* c, const float* further, float beyond, double shift,
                    int count, int u, Scratch<kLines>& own) {
  constexpr int64_t kWide = kLines * kLanes, kLong = 2 * kWide;
  constexpr int kTwice = 2 * kLines;
  const int64_t k = frame.k, d = frame.d;
  float* projected = own.projected[u];
  alignas(64) float outer[kLong] = {}, x[kLong] = {}, last[kLong] = {}, image[kLong], head[kLong];
  alignas(64) float inner[kWide], moved[kWide];
  double square = static_cast<double>(beyond) * beyond, peak = 0;
  for (int64_t i = 0; i < k; ++i) {
    outer[i] = c[i];
    square += static_cast<double>(c[i]) * c[i];
    peak = std::max(peak, static_cast<double>(projected[i * kWide + i]));
    projected[i * kWide + i] -= static_cast<float>(shift);
  }
  for (int64_t i = k; i < d; ++i) {
    outer[i] = further[i - k];
    square += static_cast<double>(outer[i]) * outer[i];
  }
  // A unit's matrices enter in units of |g_i|^2 or of R_i, or the iteration would leave float32.
  const double largest = std::max(peak, square), scale = largest > 0 ? std::max(largest, double{kTiny}) : 1.0;
  const float inverse = static_cast<float>(1.0 / scale), inverse_root = static_cast<float>(1.0 / std::sqrt(scale));
  own.residual_scales[u] = scale;
  for (int64_t i = 0; i < d; ++i) outer[i] *= inverse_root;
  const float outer_end = beyond * inverse_root;
  float x_end = 0, last_end = 0, image_end = 0;
  const auto apply = [&]() {
    const float along = dot<kTwice>(outer, x) + outer_end * x_end;
    for (int64_t l = 0; l < kLong; l += kLanes) store(head + l, load(x + l) * inverse);
    combine<kLines>(head, frame.old, d, kWide, inner);
    combine<kLines>(inner, own.block, k, kWide, moved);
    combine<kTwice>(moved, frame.old_back, k, kLong, image);
    combine<kLines>(head, projected, k, kWide, moved);
    for (int64_t l = 0; l < kLong; l += kLanes) store(image + l, load(image + l) + along * load(outer + l));
    for (int64_t l = 0; l < kWide; l += kLanes) store(image + l, load(image + l) - load(moved + l));
    image_end = outer_end * along;
  };
  for (int64_t i = 0; i < d; ++i) x[i] = outer[i] + 1.0f;
  x_end = outer_end + 1.0f;
  apply();
  const float norm = std::sqrt(dot<kTwice>(image, image) + image_end * image_end);
  const float first = 1.0f / std::max(norm, kTiny);
  for (int64_t l = 0; l < kLong; l += kLanes) store(x + l, load(image + l) * first);
  x_end = image_end * first;
  float beta = 0;
  for (int i = 0; i < count; ++i) {
    apply();
    const float alpha = dot<kTwice>(x, image) + x_end * image_end;
    own.chain_d[i * kUnits + u] = alpha;
    if (i + 1 == count) return;
    const float whole = std::sqrt(dot<kTwice>(image, image) + image_end * image_end);
    for (int64_t l = 0; l < kLong; l += kLanes)
      store(image + l, load(image + l) - alpha * load(x + l) - beta * load(last + l));
    image_end -= alpha * x_end + beta * last_end;
    beta = std::sqrt(dot<kTwice>(image, image) + image_end * image_end);
    // What rounding left of an invariant subspace is no new direction. (NaN goes on, to be found.)
    const bool stale = beta <= 64 * static_cast<float>(kUlp) * whole;
    const float step = stale ? 0.0f : 1.0f / beta;
    if (stale) beta = 0.0f;
    own.chain_e[i * kUnits + u] = beta;
    for (int64_t l = 0; l < kLong; l += kLanes) {
      store(last + l, load(x + l));
      store(x + l, load(image + l) * step);
    }
    last_end = x_end, x_end = image_end * step;
  }
}

// Householder's reduction of P to tridiagonal form, as unit u's; its vector c is reflected along. False if P has NaN.
template <int kLines>
bool tridiagonalise(const float* c, int64_t k, int u, Scratch<kLines>& own) {
  constexpr int64_t kWide = kLines * kLanes;
  alignas(64) float vector[kWide] = {}, image[kWide];
  float* a = own.product;
  const float* projected = own.projected[u];
  float peak = 0;
  double sum = 0;
#pragma omp simd reduction(max : peak) reduction(+ : sum)
  for (int64_t i = 0; i < k * kWide; ++i) peak = std::max(peak, std::abs(projected[i])), sum += projected[i];
  if (!std::isfinite(sum)) return false;
  std::frexp(peak, &own.exponents[u]);
  own.exponents[u] = std::min(std::max(own.exponents[u], -120), 120);
  const float scale = static_cast<float>(std::ldexp(1.0, -own.exponents[u]));
  for (int64_t i = 0; i < k * kWide; i += kLanes) store(a + i, load(projected + i) * scale);
  std::copy(c, c + k, vector);
  for (int64_t j = 0; j + 2 < k; ++j) {
    float* v = own.reflectors[u] + j * kWide;
    const float* row = a + j * kWide;
    for (int64_t i = 0; i < kWide; ++i) v[i] = i > j ? row[i] : 0.0f;
    const float head = v[j + 1], square = dot<kLines>(v, v);
    const bool done = std::all_of(v + j + 2, v + k, [](float x) { return x == 0.0f; });
    own.d[j][u] = row[j];
    own.e[j][u] = head;
    own.weights[u][j] = 0.0f;
    // Entries of 1e-9 times the largest are as good as zero, and their reflection's weight would be out of range.
    if (done || square < kVanishing) continue;
    const float alpha = head > 0 ? -std::sqrt(square) : std::sqrt(square);
    own.e[j][u] = alpha;
    v[j + 1] = head - alpha;
    const float weight = 1.0f / (square - alpha * head);  // 2 / v^T v
    own.weights[u][j] = weight;
    combine<kLines>(v + j + 1, a + (j + 1) * kWide, k - j - 1, kWide, image);
    const float middle = 0.5f * weight * weight * dot<kLines>(image, v);
    for (int l = 0; l < kLines; ++l)
      store(image + l * kLanes, weight * load(image + l * kLanes) - middle * load(v + l * kLanes));
    for (int64_t i = j + 1; i < k; ++i)
      for (int l = 0; l < kLines; ++l) {
        float* at = a + i * kWide + l * kLanes;
        store(at, load(at) - v[i] * load(image + l * kLanes) - image[i] * load(v + l * kLanes));
      }
    const float along = weight * dot<kLines>(v, vector);
    for (int l = 0; l < kLines; ++l)
      store(vector + l * kLanes, load(vector + l * kLanes) - along * load(v + l * kLanes));
  }
  for (int64_t j = std::max<int64_t>(k - 2, 0); j < k; ++j) {
    own.d[j][u] = a[j * kWide + j];
    own.e[j][u] = j + 1 < k ? a[j * kWide + j + 1] : 0.0f;
  }
  for (int64_t j = 0; j < k; ++j) own.z[j][u] = vector[j];
  return true;
}

template <int kLines>
void reflect_back(float* vector, int64_t k, int u, const Scratch<kLines>& own) {
  constexpr int64_t kWide = kLines * kLanes;
  for (int64_t j = k - 3; j >= 0; --j) {
    const float* v = own.reflectors[u] + j * kWide;
    const float along = own.weights[u][j] * dot<kLines>(v, vector);
    for (int l = 0; l < kLines; ++l)
      store(vector + l * kLanes, load(vector + l * kLanes) - along * load(v + l * kLanes));
  }
}

struct Operands {
  float *blocks, *rho;
  const float *coordinates, *further, *beyond;
  int iterations;
  double eps;
  float *inside, *factors;
};

// The norms of what B' leaves out of the units from `first` on, added to their rho; false if one is not finite.
template <int kLines>
bool add_residuals(const Frame<kLines>& frame, const Operands& of, int64_t first, int held, const double* shifts,
                   Scratch<kLines>& own) {
  constexpr int64_t kWide = kLines * kLanes;
  const int64_t k = frame.k, e = frame.d - k;
  const int count = static_cast<int>(std::min<int64_t>(of.iterations, frame.d + 1));
  own.chain_d.assign(static_cast<size_t>(count) * kUnits, 0.0);
  own.chain_e.assign(static_cast<size_t>(count) * kUnits, 0.0);
  for (int u = 0; u < held; ++u) {
    const int64_t unit = first + u;
    const float* stored = of.blocks + unit * k * k;
    for (int64_t i = 0; i < k; ++i) std::copy(stored + i * k, stored + (i + 1) * k, own.block + i * kWide);
    residual_chain<kLines>(frame, of.coordinates + unit * k, of.further + unit * e, of.beyond[unit], shifts[u], count,
                           u, own);
  }
  Units* chain = reinterpret_cast<Units*>(own.chain_d.data());
  if (!diagonalise(chain, reinterpret_cast<Units*>(own.chain_e.data()), nullptr, count, nullptr)) return false;
  for (int u = 0; u < held; ++u) {
    double norm = 0;
    for (int i = 0; i < count; ++i) norm = std::abs(chain[i][u]) <= norm ? norm : std::abs(chain[i][u]);
    if (!std::isfinite(norm)) return false;
    of.rho[first + u] += static_cast<float>(norm * own.residual_scales[u]);
  }
  return true;
}

// Up to kUnits units from `first` on; returns whether all their eigenproblems were solved.
template <int kLines>
bool take_group(const Frame<kLines>& frame, const Operands& of, int64_t first, int held, Scratch<kLines>& own) {
  constexpr int64_t kWide = kLines * kLanes;
  const int64_t k = frame.k;
  double shifts[kUnits] = {}, most[kUnits];
  std::fill(own.d[0], own.d[0] + k * kUnits, 0.0);
  std::fill(own.e[0], own.e[0] + k * kUnits, 0.0);
  std::fill(own.z[0], own.z[0] + k * kUnits, 0.0);
  for (int u = 0; u < held; ++u) {
    const float* stored = of.blocks + (first + u) * k * k;
    const float* c = of.coordinates + (first + u) * k;
    for (int64_t i = 0; i < k; ++i) std::copy(stored + i * k, stored + (i + 1) * k, own.block + i * kWide);
    project<kLines>(frame, c, u, own);
    if (!tridiagonalise<kLines>(c, k, u, own)) return false;
  }
  own.rotations.clear();
  if (!diagonalise(own.d, own.e, own.z, static_cast<int>(k), &own.rotations)) return false;
  for (int u = 0; u < held; ++u) {
    const double scale = std::ldexp(1.0, own.exponents[u]);
    double least = own.d[0][u];
    most[u] = least;
    for (int64_t i = 1; i < k; ++i) least = std::min(least, own.d[i][u]), most[u] = std::max(most[u], own.d[i][u]);
    shifts[u] = std::max(least * scale, 0.0);
    most[u] = std::max(most[u] * scale - shifts[u], 0.0);
  }
  if (of.beyond != nullptr) {
    if (!add_residuals<kLines>(frame, of, first, held, shifts, own)) return false;
  } else {
    for (int u = 0; u < held; ++u) {
      of.rho[first + u] += static_cast<float>(shifts[u]);
      for (int64_t i = 0; i < k; ++i) own.projected[u][i * (kWide + 1)] -= static_cast<float>(shifts[u]);
    }
  }
  for (int u = 0; u < held; ++u) {
    const double scale = std::ldexp(1.0, own.exponents[u]), damping = of.rho[first + u] + of.eps;
    const double floor = most[u] * kUlp * static_cast<double>(k);
    for (int64_t i = 0; i < k; ++i) {
      const double value = std::max(own.d[i][u] * scale - shifts[u], 0.0) + damping;
      own.z[i][u] /= std::sqrt(std::max(value, floor));
    }
    of.factors[first + u] = static_cast<float>(1.0 / std::sqrt(std::max(damping, floor)));
    float* stored = of.blocks + (first + u) * k * k;
    for (int64_t i = 0; i < k; ++i)
      std::copy(own.projected[u] + i * kWide, own.projected[u] + i * kWide + k, stored + i * k);
  }
  own.rotations.turn_back(own.z);
  for (int u = 0; u < held; ++u) {
    alignas(64) float vector[kWide] = {};
    for (int64_t i = 0; i < k; ++i) vector[i] = static_cast<float>(own.z[i][u]);
    reflect_back<kLines>(vector, k, u, own);
    std::copy(vector, vector + k, of.inside + (first + u) * k);
  }
  return true;
}

template <int kLines>
int64_t take_all(const float* to_old, Operands of, int64_t m, int64_t k, int64_t d, int threads) {
  const std::unique_ptr<Frame<kLines>> frame(new Frame<kLines>(to_old, k, d));
  int64_t unsolved = 0;
#pragma omp parallel num_threads(threads) reduction(+ : unsolved)
  {
    const std::unique_ptr<Scratch<kLines>> own(new Scratch<kLines>());
    const Range units = share(m, omp_get_thread_num(), omp_get_num_threads(), kUnits);
    for (int64_t first = units.begin; first < units.end; first += kUnits) {
      const int held = static_cast<int>(std::min<int64_t>(kUnits, units.end - first));
      if (!take_group<kLines>(*frame, of, first, held, *own)) ++unsolved;
    }
  }
  return unsolved;
}

}  // namespace

extern "C" {

// For each of m units, with S its block and P = T S T^T + c c^T where T, the first k rows of to_old (d, k), is B'^T B:
//   block <- P - shift I, shift P's smallest eigenvalue
//   rho   <- rho + ||B S B^T + g g^T - B' block B'^T||, which is the shift where there is no frame (beyond is null)
//   inside = (block + (rho + eps) I)^(-1/2) c,   factor = (rho + eps)^(-1/2), eigenvalues not below rounding
// Returns how many groups of units had an eigenproblem that did not converge (NaN), -1 for a k that is not served.
int64_t neurms_move_unit_blocks(float* blocks, float* rho, const float* to_old, const float* coordinates,
                                const float* further, const float* beyond, int64_t m, int64_t k, int64_t d,
                                int iterations, double eps, float* inside, float* factors, int threads) {
  const Operands of{blocks, rho, coordinates, further, beyond, iterations, eps, inside, factors};
  switch ((k + kLine - 1) / kLine) {
    case 1: return take_all<1 * kStep>(to_old, of, m, k, d, threads);
    case 2: return take_all<2 * kStep>(to_old, of, m, k, d, threads);
    case 3: return take_all<3 * kStep>(to_old, of, m, k, d, threads);
    case 4: return take_all<4 * kStep>(to_old, of, m, k, d, threads);
    default: return -1;
  }
}

}  // extern "C"
