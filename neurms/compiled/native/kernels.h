// Every function that Python calls, and the one table of how it is called: signatures.py reads it, the compiler holds
// the definitions to it, and nothing else is visible in the library. Their meanings stand beside the definitions.
//
// One declaration after the other, of plain types only: void, int, int64_t, float, double, and pointers.

#pragma once

#include <cstdint>

#pragma GCC visibility push(default)
extern "C" {

// processor.cpp
int neurms_level();
int neurms_wide_float32();

// unitwise.cpp
int neurms_within(int64_t count, const void* const* x, const int* rounded, const int64_t* sizes, const float* bounds,
                  int threads);
void neurms_column_square_sum(const void* x, int rounded, int64_t rows, int64_t columns, float* squares,
                              int threads);
void neurms_scaled_signal(const void* x, int rounded, int64_t rows, int64_t columns, const float* v, double weight,
                          double beta, double correction, double eps, double v_min, double low, double high,
                          float* out, float* sums, float* scaled, int threads);
void neurms_move_moments(int64_t count, const float* const* v, const float* const* squares, const int64_t* sizes,
                         const double* weights, const double* corrections, double beta, double eps, double v_min,
                         double low, double high, double kappa, float* const* moved, float* const* made);
void neurms_apply_updates(int64_t count, float* const* w, const float* const* g, float* const* velocity,
                          const int64_t* m, const int64_t* n, const float* const* left, const float* const* right,
                          const float* rate, const float* decay, float momentum, float fresh, int scale_gradient,
                          int scale_velocity, int nesterov, double* measured, int threads);
void neurms_move_square_sums(int64_t count, const float* const* x, const int64_t* m, const int64_t* n,
                             const float* const* left, const float* const* right, double* sums, int threads);

// channel_sums.cpp
void neurms_channel_square_sum(const void* x, int rounded, int64_t images, int64_t channels, int64_t positions,
                               float* squares, int threads);

// update_gemm.cpp
int neurms_bf16_engine();
int neurms_update_gemm(void* const* tensors, int64_t m, int64_t n, int64_t rows, int rounded, float step, float decay,
                       float momentum, int coupled, int engine, int threads);

// row_update.cpp
void neurms_row_normalized_updates(int64_t count, float* const* w, float* const* momentum, const float* const* g,
                                   const int64_t* m, const int64_t* n, const int64_t* turned, const float* steps,
                                   const float* decays, float mu, int nesterov, float floor, int threads);

// two_sided.cpp
int neurms_two_sided_fit(const float* g, int64_t m, int64_t n, int iterations, float tolerance, float* q, float* s,
                         int threads);
int neurms_two_sided_fit_transposed(const float* a, int64_t n, int64_t m, int iterations, float tolerance, float* q,
                                    float* s, int threads);
void neurms_two_sided_scales(int64_t count, const float* const* g, const int64_t* m, const int64_t* n,
                             const int64_t* turned, int iterations, float tolerance, float fresh,
                             const float* corrections, const float* const* q, const float* const* s,
                             float* const* new_q, float* const* new_s, float* const* left, float* const* right,
                             double* norms, int threads);
double neurms_scaled_square_sum(const float* g, int64_t m, int64_t n, const float* left, const float* right,
                                int threads);

// square_sums.cpp
void neurms_square_sums(int64_t count, const float* const* g, const float* const* v, double fresh, double kept,
                        const int64_t* m, const int64_t* n, double* const* rows, double* const* columns,
                        int threads);
void neurms_column_squares(int64_t count, const float* const* g, const float* const* v, double fresh, double kept,
                           const int64_t* m, double* const* rows, double* const* sums);
void neurms_gradient_factors(int64_t count, const double* const* rows, const double* const* columns,
                             const float* const* q, const float* const* s, const int64_t* m, const int64_t* n,
                             const double* corrections, double beta, double kappa, double damping,
                             int one_sided, float* const* new_q, float* const* new_s, float* const* left,
                             float* const* right);

// probes.cpp
void neurms_probe_products(const float* errors, const float* activations, int64_t rows, int64_t m, int64_t n,
                           const float* right, const float* left, int64_t k, int ones, float* forth, float* back,
                           int threads);

// gradient_steps.cpp
int neurms_gradient_steps(int64_t count, float* const* tensors, const int64_t* m, const int64_t* n,
                          const int64_t* widths, const double* corrections, const float* rates, double beta,
                          double kappa, double damping, double mu, int nesterov, int of_averages, double greatest,
                          int threads);

// two_sided_once.cpp
void neurms_two_sided_once(int64_t count, const float* const* g, const int64_t* m, const int64_t* n,
                           const int64_t* turned, const float* corrections, double beta, int tracked,
                           const float* const* q, const float* const* s, float* const* new_q, float* const* new_s,
                           float* const* left, float* const* right, double* norms, int threads);

// two_sided_steps.cpp
int neurms_two_sided_steps(int64_t count, float* const* tensors, const int64_t* m, const int64_t* n,
                           const int64_t* steps, const float* corrections, const double* rates, const float* decays,
                           double beta, int rounds, float tolerance, double gamma, int threads);

// unit_blocks.cpp
int64_t neurms_move_unit_blocks(float* blocks, float* rho, const float* to_old, const float* coordinates,
                                const float* further, const float* beyond, int64_t m, int64_t k, int64_t d,
                                int iterations, double eps, float* inside, float* factors, int threads);

}  // extern "C"
#pragma GCC visibility pop
