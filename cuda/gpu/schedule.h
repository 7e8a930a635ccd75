// The order of a call's launches and of their phases, and what is passed on between tiles.
//
// A barrier follows each phase. Between two barriers, no thread reads or writes what another thread writes. Within a
// launch, no block reads or writes what another block writes. So the tests can run the threads on a CPU, one after
// another and in any order (tests/modules/biwkv4_emulation.cpp).
#pragma once

#include <cstdint>

#include "device.h"
#include "phases.h"
#include "thread.h"

namespace biwkv {

// Tells the other tiles the sums of this one: over keys at kSums, or over gradients at kTileGradients.
template <class T>
BIWKV_DEVICE void tell_sums(const T& t, int at) {
  auto forth = T::Weights::nothing(), back = forth;
  join_warps(t, t.all.warps, -1, t.all.run, forth, back);
  T::Weights::put(forth, t.told(at, t.tile), t.told_stride());
  T::Weights::put(back, t.told(at + kTileState, t.tile), t.told_stride());
}

// A warp has the tiles from its share up to the next warp's.
template <class T>
BIWKV_DEVICE int64_t share(const T& t, int warp) {
  return static_cast<int64_t>(t.all.tiles) * warp / t.all.warps;
}

template <class T>
BIWKV_DEVICE void put_peak_of_tiles(const T& t) {
  const auto at = [&](int64_t of) { return get_peak(t.told(kPeak, of), t.told_stride()); };
  put_peak(join_peaks<T>(share(t, t.warp), share(t, t.warp + 1), at), t.slot(kPeak, t.warp), T::kSlots);
}

// Puts on the board what the warp's tiles contribute to the sums before and after this tile.
template <class T>
BIWKV_DEVICE void put_sums_of_tiles(const T& t, int at) {
  using Weights = typename T::Weights;
  auto before = Weights::nothing(), after = before;
#pragma unroll 4
  for (int64_t of = share(t, t.warp); of < share(t, t.warp + 1); ++of) {
    if (of == t.tile) continue;
    auto sum = Weights::get(t.told(of < t.tile ? at : at + kTileState, of), t.told_stride());
    if (at == kSums) sum = Weights::moved(sum, t.frame_of(get_peak(t.told(kPeak, of), t.told_stride())), t.frame);
    const int64_t between = (of < t.tile ? t.tile - of : of - t.tile) - 1;
    sum = t.weights.aged(sum, between * t.all.warps * t.all.run);
    if (of < t.tile) before = Weights::plus(before, sum);
    else after = Weights::plus(after, sum);
  }
  put_sums(t, before, after);
}

// Tells the tile's gradients of w and u, for sum_parameters.
template <class T>
BIWKV_DEVICE void tell_parameters(const T& t) {
  double w = 0, u = 0;
#pragma unroll 4
  for (int of = 0; of < t.all.warps; ++of) w += *t.slot(0, of), u += *t.slot(1, of);
  *t.told(kTileW, t.tile) = w, *t.told(kTileU, t.tile) = u;
}

// Sums the gradients of one channel's w and u over the batch and the tiles, in a fixed order.
BIWKV_DEVICE void sum_parameters(const Work& all, int64_t channel) {
  double w = 0, u = 0;
  const int64_t parts = all.batch * all.tiles;
#pragma unroll 8
  for (int64_t part = 0; part < parts; ++part) {
    w += all.told[(kTileW * parts + part) * all.channels + channel];
    u += all.told[(kTileU * parts + part) * all.channels + channel];
  }
  static_cast<float*>(all.grad_w)[channel] = static_cast<float>(w);
  static_cast<float*>(all.grad_u)[channel] = static_cast<float>(u);
}

// What a launch computes. With several tiles, launches that tell the sums of each tile come first.
enum Stage { kOutputKeys, kOutput, kGradientKeys, kGradientSums, kGradients };
BIWKV_SHARED constexpr bool is_backward(Stage stage) { return stage >= kGradientKeys; }

// Runs the phases of a block of threads. each(phase) calls phase(thread) for the active threads, then has a barrier.
template <Stage stage, class Each>
BIWKV_DEVICE void run_phases(const Each& each, bool several) {
  constexpr bool first = stage == kOutputKeys || stage == kGradientKeys;
  if (!first && several) {
    each([](auto& t) { put_peak_of_tiles(t); });
    each([](auto& t) { find_frame(t), put_sums_of_tiles(t, kSums); });
    each([](auto& t) { join_warps(t, t.all.warps, -1, 0, t.before, t.after); });
    if (stage == kGradients) {
      each([](auto& t) { put_sums_of_tiles(t, kTileGradients); });
      each([](auto& t) { join_warps(t, t.all.warps, -1, 0, t.earlier, t.later); });
    }
  }
  each([](auto& t) { sum_keys(t), put_peak(t.own, t.slot(kPeak, t.warp), t.kSlots); });
  each([=](auto& t) {
    if (first || !several) find_frame(t);
    put_sums(t, t.weights.moved(t.forth, t.own, t.frame), t.weights.moved(t.back, t.own, t.frame));
  });
  if constexpr (first) {
    each([](auto& t) {
      if (t.warp == 0) tell_sums(t, kSums), put_peak(t.top, t.told(kPeak, t.tile), t.told_stride());
    });
  } else {
    each([](auto& t) { join_warps(t, t.warp, t.warp, t.all.run, t.before, t.after); });
  }
  if constexpr (stage == kOutput) each([](auto& t) { write_output(t); });
  if constexpr (stage == kGradientSums || stage == kGradients) {
    each([](auto& t) { sum_gradients(t), put_sums(t, t.forth, t.back); });
  }
  if constexpr (stage == kGradientSums) {
    each([](auto& t) {
      if (t.warp == 0) tell_sums(t, kTileGradients);
    });
  }
  if constexpr (stage == kGradients) {
    each([](auto& t) { join_warps(t, t.warp, t.warp, t.all.run, t.earlier, t.later), write_gradients(t); });
    each([](auto& t) { *t.slot(0, t.warp) = t.weights.to_w(t.to_w), *t.slot(1, t.warp) = t.to_u; });
    each([](auto& t) {
      if (t.warp == 0) tell_parameters(t);
    });
  }
}

// Runs the launches of a call, in order.
template <class Launches>
void run_stages(const Launches& launches, bool backward, bool several) {
  if (!backward) {
    if (several) launches.template run<kOutputKeys>();
    launches.template run<kOutput>();
  } else {
    if (several) launches.template run<kGradientKeys>(), launches.template run<kGradientSums>();
    launches.template run<kGradients>();
    launches.sum_parameters();
  }
}

}  // namespace biwkv
