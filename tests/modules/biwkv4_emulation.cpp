// The GPU's phases (cuda/gpu/schedule.h) on the CPU: block after block and phase after phase, and within a phase thread
// after thread, in an order that biwkv4_emulation_order chooses. A missing barrier or a race between threads of a block
// or between blocks would change results. Float32 only; the interface is that of the real libraries.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include "gpu/schedule.h"
#include "gpu/thread.h"
#include "gpu/weights.h"
#include "shared/abi.h"

using namespace biwkv;

static int chosen = 0;  // 0: in order, 1: reversed, 2: at random

static std::vector<int64_t> order_of(int64_t count) {
  static std::mt19937 random;
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (chosen == 1) std::reverse(order.begin(), order.end());
  if (chosen == 2) std::shuffle(order.begin(), order.end(), random);
  return order;
}

template <class T>
struct Each {
  std::vector<T>& threads;

  template <class Phase>
  void operator()(const Phase& phase) const {
    for (const int64_t i : order_of(threads.size())) {
      if (threads[i].active) phase(threads[i]);
    }
  }
};

struct Launches {
  const Work& all;

  template <Stage stage>
  void run() const {
    for (const int64_t block : order_of(all.blocks())) {
      std::vector<double> board(kBoardBytes / sizeof(double), NAN);
      run_block<stage, OneShift>(block, board, 0);
      for (int from = 0; from < kLanes; from += RunningMaximum::kLanesAtOnce) {
        run_block<stage, RunningMaximum>(block, board, from);
      }
    }
  }
  template <Stage stage, class Weights>
  void run_block(int64_t block, std::vector<double>& board, int from) const {
    using T = Thread<float, Weights, is_backward(stage)>;
    std::vector<T> threads;
    for (int i = 0; i < kLanes * all.warps; ++i) {
      threads.emplace_back(all, board.data(), block, i / kLanes, i % kLanes, from);
    }
    run_phases<stage>(Each<T>{threads}, all.tiles > 1);
  }
  void sum_parameters() const {
    for (int64_t channel = 0; channel < all.channels; ++channel) biwkv::sum_parameters(all, channel);
  }
};

static int run(BiwkvCall call, bool backward) {
  if (call.type != BIWKV_FLOAT32) return BIWKV_BAD_TYPE;
  std::vector<double> workspace(Work(call).bytes_of_workspace() / sizeof(double), NAN);
  call.workspace = workspace.data();
  const Work all(call);
  run_stages(Launches{all}, backward, all.tiles > 1);
  return BIWKV_OK;
}

extern "C" {

int biwkv4_forward(const BiwkvCall* call) { return run(*call, false); }

int biwkv4_backward(const BiwkvCall* call) { return run(*call, true); }

void biwkv4_emulation_order(int order) { chosen = order; }
}
