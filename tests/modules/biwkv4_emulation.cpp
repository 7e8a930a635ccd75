// The GPU's phases (cuda/gpu/phases.h) on the CPU, one thread's work after another: what cannot be seen without a
// GPU is the launches alone. Float32 only; the interface is that of the real libraries.
#include <cmath>
#include <cstdint>
#include <vector>

#include "gpu/cell.h"
#include "gpu/phases.h"
#include "gpu/weights.h"
#include "shared/abi.h"

using namespace biwkv;

// Runs a phase for all channels, or for those beyond the bound.
struct Each {
  const Tensors<float>& all;
  bool only_beyond;

  template <void (*phase)(const Tensors<float>&, int64_t, int64_t, int64_t)>
  void run(int64_t rows) const {
    for (int64_t b = 0; b < all.batch; ++b) {
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t channel = 0; channel < all.channels; ++channel) {
          if (!only_beyond || all.beyond(channel)) phase(all, b, row, channel);
        }
      }
    }
  }
};

template <bool backward>
static int run(const BiwkvCall& call) {
  if (call.type != BIWKV_FLOAT32) return BIWKV_BAD_TYPE;
  const int64_t chunks = chunks_of(call.length);
  std::vector<float> workspace(numbers_of(call.length, backward) * call.batch * call.channels, NAN);
  const auto f = [](const void* p) { return static_cast<const float*>(p); };
  const auto g = [](void* p) { return static_cast<float*>(p); };
  const Tensors<float> all = {f(call.w), f(call.u), f(call.k), f(call.v), f(call.grad_y), g(call.y), g(call.grad_k),
                              g(call.grad_v), g(call.grad_w), g(call.grad_u), call.k_batch, call.k_time, call.v_batch,
                              call.v_time, call.grad_y_batch, call.grad_y_time, call.batch, call.length,
                              call.channels, chunks, workspace.data()};
  run_phases<float, OneShift, backward>(Each{all, false}, chunks);
  run_phases<float, RunningMaximum, backward>(Each{all, true}, chunks);
  if (backward) {
    for (int64_t channel = 0; channel < call.channels; ++channel) sum_parameters(all, 0, 0, channel);
  }
  return BIWKV_OK;
}

extern "C" {

int biwkv4_forward(const BiwkvCall* call) { return run<false>(*call); }

int biwkv4_backward(const BiwkvCall* call) { return run<true>(*call); }
}
