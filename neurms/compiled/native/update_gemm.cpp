// W <- decay W - step S (D^T H) C in one pass over W, or over it and its velocity; the product of bfloat16 numbers with
// float32 sums, or of float32. The eager definition in neurms/compiled/gemm.py is the specification.
//
// D and H are first packed into tiles of 1 KiB: of float32, or of bfloat16 numbers of two successive rows side by side
// as the processor's instructions want them. Then each thread works down its own rows of W, 32 x 32 elements at a time:
// the sums over all rows of D and H stay in registers until they are complete, so that W is read and written once and
// nothing of its size is ever formed. Panels of H are made to stay in the second-level cache meanwhile.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#include <omp.h>

#include "common.h"
#include "move.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define NEURMS_BF16 1
#include <immintrin.h>
#endif

#if defined(NEURMS_BF16) && defined(__AMX_BF16__) && defined(__linux__)
#define NEURMS_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

enum Engine { kNone = 0, kVector = 1, kTiles = 2, kFloats = 3 };

#ifdef NEURMS_AMX
// Linux lends the tile registers to processes that have asked for them.
bool tiles_granted() {
  constexpr int kRequest = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return granted;
}
#endif

// Vectors only where they gain something: Intel's processors begin a bfloat16 product every other cycle, on one port,
// so that the float32 product of the BLAS library is twice as fast as this one; Zen 4 begins one in each.
int best_engine() {
#ifdef NEURMS_AMX
  if (tiles_granted()) return kTiles;
#endif
#ifdef NEURMS_BF16
  __builtin_cpu_init();
  if (__builtin_cpu_is("amd")) return kVector;
#endif
  return kNone;
}

#ifdef NEURMS_BF16

constexpr int64_t kSide = 16;             // units or features in a tile
constexpr int64_t kWords = kSide * kSide; // of 32 bits in a tile
constexpr int64_t kRun = 8;              // tiles of a row that are written together
constexpr int64_t kChunk = 128;           // rows of a sum whose factors stay in the first-level cache

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Memory that a thread keeps for its next call: fresh pages would cost it as much as the product.
class Scratch {
 public:
  uint32_t* words(int64_t count) {
    if (count > size_) {
      held_.reset(static_cast<uint32_t*>(std::aligned_alloc(64, count * sizeof(uint32_t))));
      size_ = held_ ? count : 0;
    }
    return held_.get();
  }

 private:
  std::unique_ptr<uint32_t, Free> held_;
  int64_t size_ = 0;
};

// How numbers of type Stored are packed: of how many rows a word holds numbers, and words of 16 columns of such rows,
// `second` null for a row of zeros.
template <typename Stored>
struct Pairs {
  using Number = Stored;
  static constexpr int64_t kRows = 2;
  static constexpr int64_t kPanel = 1 << 18;  // words of H that are worked on together: 1 MiB
  static __m512i words(const Number* first, const Number* second, __mmask16 mask, __m512i order);
};

struct Singles {
  using Number = float;
  static constexpr int64_t kRows = 1;
  static constexpr int64_t kPanel = 1 << 17;  // the half is faster by 4 % where every product is one row
  static __m512i words(const float* first, const float*, __mmask16 mask, __m512i) {
    return reinterpret_cast<__m512i>(_mm512_maskz_loadu_ps(mask, first));
  }
};

template <>
inline __m512i Pairs<float>::words(const float* first, const float* second, __mmask16 mask, __m512i order) {
  const __m512 a = _mm512_maskz_loadu_ps(mask, first);
  const __m512 b = second ? _mm512_maskz_loadu_ps(mask, second) : _mm512_setzero_ps();
  return _mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)));
}

template <>
inline __m512i Pairs<uint16_t>::words(const uint16_t* first, const uint16_t* second, __mmask16 mask, __m512i order) {
  const __m256i a = _mm256_maskz_loadu_epi16(mask, first);
  const __m256i b = second ? _mm256_maskz_loadu_epi16(mask, second) : _mm256_setzero_si256();
  return _mm512_permutexvar_epi16(order, _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1));
}

inline __m512i interleaving() {
  alignas(64) int16_t order[32];
  for (int j = 0; j < 16; ++j) order[2 * j] = static_cast<int16_t>(j), order[2 * j + 1] = static_cast<int16_t>(16 + j);
  return _mm512_load_si512(order);
}

// The 16 x 16 words of r, turned over.
inline void transpose(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  // The quarters of r[4 i + c] now hold column c, 4 + c, 8 + c and 12 + c of four rows.
  for (int c = 0; c < 4; ++c) {
    const __m512i even = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88), odd = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
    const __m512i even2 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
    const __m512i odd2 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
    t[c] = _mm512_shuffle_i32x4(even, even2, 0x88);
    t[8 + c] = _mm512_shuffle_i32x4(even, even2, 0xdd);
    t[4 + c] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
    t[12 + c] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
  }
  std::memcpy(r, t, sizeof t);
}

// One tile: columns [column, column + 16) of the rows from `row` on that fit, absent ones as zeros. `turned` has words
// by column first, as the left factor of a product wants them; else by row, or pair of rows, first.
template <typename Form>
void pack_tile(const typename Form::Number* x, int64_t rows, int64_t columns, int64_t row, int64_t column, bool turned,
               uint32_t* out) {
  const __m512i order = interleaving();
  const int64_t width = std::min(kSide, columns - column);
  const __mmask16 mask = width > 0 ? static_cast<__mmask16>((1u << width) - 1) : 0;
  __m512i r[16];
  for (int64_t i = 0; i < kSide; ++i) {
    const int64_t first = row + Form::kRows * i;
    const typename Form::Number* p = x + first * columns + column;
    r[i] = first < rows && mask ? Form::words(p, first + 1 < rows ? p + columns : nullptr, mask, order)
                                : _mm512_setzero_si512();
  }
  if (turned) transpose(r);
  for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(out + i * kSide, r[i]);
}

// The tiles of a range of columns, tile by tile of 16: along the rows of x, whose lines then come in one after the other.
template <typename Form>
void pack(const typename Form::Number* x, int64_t rows, int64_t columns, int64_t depth, Range tiles, bool turned,
          uint32_t* out) {
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t t = tiles.begin; t < tiles.end; ++t)
      pack_tile<Form>(x, rows, columns, k * kSide * Form::kRows, t * kSide, turned, out + (t * depth + k) * kWords);
}

// Two tiles of units and two of features, `apart` words from one to the next, over `chunk` tiles of rows. The sums are
// four tiles of 16 x 16: [unit tile][feature tile][unit][feature]; `goes_on` adds to what is there.
struct Block {
  const uint32_t *a, *b;
  int64_t apart, chunk;
  bool goes_on;
};

// Adds the products of a word, of one row or of two, in 16 places.
template <int64_t kRows>
inline __m512 add_product(__m512 sum, __m512i left, __m512i right) {
  if constexpr (kRows == 1)
    return _mm512_fmadd_ps(reinterpret_cast<__m512>(left), reinterpret_cast<__m512>(right), sum);
  else
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(left), reinterpret_cast<__m512bh>(right));
}

template <int64_t kRows>
void multiply_vectors(const Block& block, float* out) {
  for (int64_t half = 0; half < 4; ++half) {  // eight units at a time: sixteen sums fit the registers
    float* own = out + half / 2 * 2 * kWords + half % 2 * 8 * kSide;
    __m512 sums[8][2];
    for (int i = 0; i < 8; ++i)
      for (int j = 0; j < 2; ++j)
        sums[i][j] = block.goes_on ? _mm512_load_ps(own + j * kWords + i * kSide) : _mm512_setzero_ps();
    const uint32_t *left = block.a + half / 2 * block.apart + half % 2 * 8 * kSide, *one = block.b;
    for (int64_t k = 0; k < block.chunk; ++k, left += kWords, one += kWords) {
      const uint32_t* two = one + block.apart;
      for (int64_t word = 0; word < kSide; ++word) {
        const __m512i x = _mm512_load_si512(one + word * kSide), y = _mm512_load_si512(two + word * kSide);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
          const __m512i l = _mm512_set1_epi32(static_cast<int>(left[i * kSide + word]));
          sums[i][0] = add_product<kRows>(sums[i][0], l, x);
          sums[i][1] = add_product<kRows>(sums[i][1], l, y);
        }
      }
    }
    for (int i = 0; i < 8; ++i)
      for (int j = 0; j < 2; ++j) _mm512_store_ps(own + j * kWords + i * kSide, sums[i][j]);
  }
}

#ifdef NEURMS_AMX

void configure_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {0};
    uint16_t bytes[16] = {0};
    uint8_t rows[16] = {0};
  } layout;
  for (int tile = 0; tile < 8; ++tile) layout.bytes[tile] = 64, layout.rows[tile] = 16;
  _tile_loadconfig(&layout);
}

void multiply_tiles(const Block& block, float* out) {
  constexpr int64_t kRow = 64;  // bytes
  if (block.goes_on) {
    _tile_loadd(0, out, kRow);
    _tile_loadd(1, out + kWords, kRow);
    _tile_loadd(2, out + 2 * kWords, kRow);
    _tile_loadd(3, out + 3 * kWords, kRow);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const uint32_t *a = block.a, *b = block.b;
  for (int64_t k = 0; k < block.chunk; ++k, a += kWords, b += kWords) {
    _tile_loadd(4, a, kRow);
    _tile_loadd(6, b, kRow);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + block.apart, kRow);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + block.apart, kRow);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out, kRow);
  _tile_stored(1, out + kWords, kRow);
  _tile_stored(2, out + 2 * kWords, kRow);
  _tile_stored(3, out + 3 * kWords, kRow);
}

#endif

void multiply(const Block& block, float* out, int engine) {
#ifdef NEURMS_AMX
  if (engine == kTiles) return multiply_tiles(block, out);
#endif
  return engine == kFloats ? multiply_vectors<1>(block, out) : multiply_vectors<2>(block, out);
}

struct Update {
  float *w, *velocity;
  int64_t m, n;
  const float *s, *c;
  float step, decay;
  Rule rule;
};

// Writes sums into W at (unit, feature), 32 units of `tiles` tiles, as far as W goes. Each row in one run: rows of W
// often lie a multiple of 4 KiB apart, where the first-level cache can hold few of them at a time.
void write_run(const Update& u, const float* sums, int64_t unit, int64_t feature, int64_t tiles) {
  const int64_t width = std::min(tiles * kSide, u.n - feature);
  for (int64_t i = 0; i < std::min(2 * kSide, u.m - unit); ++i) {
    float* w = u.w + (unit + i) * u.n + feature;
    const float* own = sums + i / kSide * 2 * kWords + i % kSide * kSide;
    float* velocity = u.velocity ? u.velocity + (unit + i) * u.n + feature : nullptr;
    alignas(64) float run[kRun * kSide];
    for (int64_t j = 0; j < width; j += kSide) {
      _mm512_store_ps(run + j, _mm512_load_ps(own + j / (2 * kSide) * 4 * kWords + j / kSide % 2 * kWords));
      // The next run of this row, while there is time.
      _mm_prefetch(reinterpret_cast<const char*>(w + j + kRun * kSide), _MM_HINT_T1);
      if (velocity) _mm_prefetch(reinterpret_cast<const char*>(velocity + j + kRun * kSide), _MM_HINT_T1);
    }
    const float* c = u.c ? u.c + feature : nullptr;
    move<false>(u.rule.row(velocity, u.s ? u.s[unit + i] : 1.0f, c, u.step, u.decay), w, run, velocity, width);
  }
}

template <typename Form>
bool update(const Update& u, const void* errors, const void* activations, int64_t rows, int engine, int threads) {
  using Number = typename Form::Number;
  const Number *d = static_cast<const Number*>(errors), *h = static_cast<const Number*>(activations);
  const int64_t height = kSide * Form::kRows, depth = (rows + height - 1) / height;
  constexpr int64_t chunk = kChunk / (kSide * Form::kRows);
  // Tiles come in twos.
  const int64_t unit_tiles = (u.m + 2 * kSide - 1) / (2 * kSide) * 2;
  const int64_t feature_tiles = (u.n + 2 * kSide - 1) / (2 * kSide) * 2;
  static thread_local Scratch scratch;
  uint32_t* const left = scratch.words((unit_tiles + feature_tiles) * depth * kWords);
  if (!left) return false;
  uint32_t* const right = left + unit_tiles * depth * kWords;
  const int64_t panel = std::max(kRun, Form::kPanel / (depth * kWords) / kRun * kRun);
#pragma omp parallel num_threads(threads)
  {
#ifdef NEURMS_AMX
    if (engine == kTiles) configure_tiles();
#endif
    const int part = omp_get_thread_num(), parts = omp_get_num_threads();
    pack<Form>(d, rows, u.m, depth, share(unit_tiles, part, parts, 2), true, left);
    pack<Form>(h, rows, u.n, depth, share(feature_tiles, part, parts, 2), false, right);
#pragma omp barrier
    alignas(64) float sums[kRun * 2 * kWords];
    for (int64_t begin = 0; begin < feature_tiles; begin += panel) {
      const int64_t end = std::min(feature_tiles, begin + panel);
#pragma omp for schedule(static) nowait
      for (int64_t i = 0; i < unit_tiles; i += 2) {
        const uint32_t* a = left + i * depth * kWords;
        for (int64_t run = begin; run < end; run += kRun) {
          const int64_t tiles = std::min(kRun, end - run);
          for (int64_t k = 0; k < depth; k += chunk)
            for (int64_t j = 0; j < tiles; j += 2) {
              const uint32_t* b = right + ((run + j) * depth + k) * kWords;
              multiply({a + k * kWords, b, depth * kWords, std::min(chunk, depth - k), k > 0},
                       sums + j * 2 * kWords, engine);
            }
          write_run(u, sums, i * kSide, run * kSide, tiles);
        }
      }
    }
#ifdef NEURMS_AMX
    if (engine == kTiles) _tile_release();
#endif
  }
  return true;
}

#endif  // NEURMS_BF16

}  // namespace

extern "C" {

// What is worth multiplying bfloat16 numbers with here: 0 nothing, 1 vectors (AVX512-BF16), 2 tiles (AMX).
int neurms_bf16_engine() { return best_engine(); }

// W (m x n) <- decay W - step S (D^T H) C; with a velocity, V <- momentum V + S (D^T H) C and W <- decay W - step V, or
// - step S V C if `coupled`. `tensors` are W, V or null, D (rows x m), H (rows x n), s and c, which are 1 where null. D
// and H are float32, which engines of bfloat16 round, or bfloat16 already, if `rounded`. Returns 0 where it has done
// nothing, for want of the engine (as above, or 3: float32 by vectors of 512 bits) or of memory.
int neurms_update_gemm(void* const* tensors, int64_t m, int64_t n, int64_t rows, int rounded, float step, float decay,
                       float momentum, int coupled, int engine, int threads) {
#ifdef NEURMS_BF16
  if (engine == kNone || (engine == kTiles && best_engine() != kTiles) || (engine == kFloats && rounded)) return 0;
  const auto floats = [&](int k) { return static_cast<float*>(tensors[k]); };
  const Rule rule{momentum, 1.0f, true, coupled != 0, false};
  const Update u{floats(0), floats(1), m, n, floats(4), floats(5), step, decay, rule};
  const auto work = engine == kFloats ? update<Singles> : rounded ? update<Pairs<uint16_t>> : update<Pairs<float>>;
  return work(u, tensors[2], tensors[3], rows, engine, threads);
#else
  return 0;
#endif
}

}  // extern "C"
