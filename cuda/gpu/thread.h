// The data of a GPU thread (phases.h): the division of a call among threads, and the memory that they share.
#pragma once

#include <cmath>
#include <cstdint>

#include "../shared/abi.h"
#include "../shared/accumulators.h"
#include "device.h"
#include "weights.h"

namespace biwkv {

constexpr int kWarps = 12;    // most warps of a block of threads; with more, registers would spill
constexpr int kWhole = 4096;  // rows of the longest sequence that is one tile
constexpr int kTile = 512;    // rows of each tile of a longer sequence

// What warps tell one another on the board, which is in shared memory, and tiles in `told`: a Peak, and at kSums two
// states, forth and back. A tile has two more states over gradients, and then the gradients of w and u.
enum Field { kPeak, kSums = 3 };
constexpr int kTileState = RunningMaximum::kWidth, kTileGradients = kSums + 2 * kTileState;
constexpr int kTileW = kTileGradients + 2 * kTileState, kTileU = kTileW + 1, kTileFields = kTileU + 1;
constexpr int kBoardBytes = (kSums + 2 * OneShift::kWidth) * kWarps * kLanes * 4;
static_assert((kSums + 2 * RunningMaximum::kWidth) * kWarps * RunningMaximum::kLanesAtOnce * 8 <= kBoardBytes);

// A thread notes two states about each block of rows: the sums over earlier keys and over earlier gradients. Before, it
// notes the state of later keys and its frame.
constexpr int kNoteBytes = 2 * OneShift::kWidth * kLanes * 4;
static_assert(2 * RunningMaximum::kWidth * RunningMaximum::kLanesAtOnce * 8 <= kNoteBytes);
static_assert(OneShift::kWidth + 2 <= 2 * OneShift::kWidth);

// A call and its division. A block of threads has kLanes channels of one tile of a sequence, a warp one run of its rows.
struct Work : BiwkvCall {
  unsigned tiles, groups;  // tiles of a sequence, and groups of kLanes channels
  int warps, run;          // runs of a tile, and rows of a run
  int64_t notes;           // bytes of a block of threads
  double* told;            // (kTileFields, batch, tiles, channels)
  char* noted;             // (batch, tiles, groups, notes)

  explicit Work(const BiwkvCall& call) : BiwkvCall(call) {
    const int rows = length <= kWhole ? static_cast<int>(length) : kTile, least = kWarps * kBlock;
    run = (rows + least - 1) / least * kBlock, warps = (rows + run - 1) / run;
    tiles = static_cast<unsigned>((length + warps * run - 1) / (warps * run));
    groups = static_cast<unsigned>((channels + kLanes - 1) / kLanes);
    notes = static_cast<int64_t>(kNoteBytes) * warps * (run / kBlock);
    told = static_cast<double*>(workspace), noted = static_cast<char*>(workspace) + bytes_told();
  }
  int64_t blocks() const { return batch * tiles * groups; }
  int64_t bytes_told() const { return kTileFields * batch * tiles * channels * static_cast<int64_t>(sizeof(double)); }
  int64_t bytes_of_workspace() const { return bytes_told() + blocks() * notes; }
  BIWKV_DEVICE float w_of(int64_t channel) const { return static_cast<const float*>(w)[channel]; }
  BIWKV_DEVICE float u_of(int64_t channel) const { return static_cast<const float*>(u)[channel]; }
};

// The frame of some keys' sums: their largest key, and the mean of their values. And the sum of their e^(k - base).
struct Peak : Frame {
  float weight;
};

// One channel of one run.
template <class Number, class Weights_, bool backward>
struct Thread {
  using Weights = Weights_;
  using Real = typename Weights::Real;
  using State = typename Weights::State;
  static constexpr bool kCenters = backward && Weights::kCentered;
  static constexpr int kSlots = kWarps * Weights::kLanesAtOnce;  // from a field on the board to the next

  const Work& all;
  Real *const board, *const notes;
  const int warp, lane;
  const unsigned b, tile, channel;
  const int64_t first;  // row of the run
  const int rows;
  const bool active;
  const Weights weights;
  Peak own, top;                        // of the run, and of all runs or tiles
  Frame frame;                          // of all sums
  State forth, back;                    // sums of the run alone, from its start and from its end
  State before, after, earlier, later;  // over keys and over gradients before and after the tile, then the run
  Real to_w = 0, to_u = 0;              // the run's gradients of w and u

  // It is active if its channel exists, is one of kLanesAtOnce channels from lane `from`, and needs these Weights.
  BIWKV_DEVICE Thread(const Work& all, void* board, unsigned block, int warp, int lane, int from)
      : all(all),
        board(static_cast<Real*>(board)),
        notes(reinterpret_cast<Real*>(all.noted + block * all.notes)),
        warp(warp),
        lane(lane - from),
        b(block / all.groups / all.tiles),
        tile(block / all.groups % all.tiles),
        channel(block % all.groups * kLanes + lane),
        first((static_cast<int64_t>(tile) * all.warps + warp) * all.run),
        rows(static_cast<int>(all.length <= first ? 0 : all.length - first < all.run ? all.length - first : all.run)),
        active(channel < all.channels && lane >= from && lane < from + Weights::kLanesAtOnce &&
               within_bound(all.w_of(channel), all.u_of(channel), all.length) != Weights::kBeyond),
        weights(active ? all.w_of(channel) : 0.0f, active ? all.u_of(channel) : 0.0f),
        own(no_peak()) {
    forth = back = before = after = earlier = later = Weights::nothing();
  }

  BIWKV_DEVICE int blocks() const { return (rows + kBlock - 1) / kBlock; }

  // The key is not -inf, so that keys of only -inf give zeros, not NaN.
  static BIWKV_DEVICE Peak no_peak() { return {{-3.40282347e38f, 0.0f}, 0.0f}; }
  BIWKV_DEVICE Frame frame_of(const Peak& peak) const {
    return {Weights::base_of(peak.base, all.w_of(channel) * all.length), peak.center};
  }

  // Where numbers are: of a warp on the board, of a block of rows in the notes, and of a tile.
  BIWKV_DEVICE Real* slot(int field, int of) const {
    return board + field * kSlots + of * Weights::kLanesAtOnce + lane;
  }
  BIWKV_DEVICE Real* note(int which, int block) const {
    const int64_t at = warp * (all.run / kBlock) + block;
    return notes + (at * 2 * Weights::kWidth + which) * Weights::kLanesAtOnce + lane;
  }
  BIWKV_DEVICE int64_t told_stride() const { return all.batch * all.tiles * all.channels; }
  BIWKV_DEVICE double* told(int field, int64_t of) const {
    return all.told + field * told_stride() + (b * all.tiles + of) * all.channels + channel;
  }

  // Loads a block of rows. Rows beyond the sequence have the key -inf, and so no weight.
  BIWKV_DEVICE void load(int block, float (&keys)[kBlock], float (&values)[kBlock]) const {
    const int64_t row = first + block * kBlock;
    const Number* k = static_cast<const Number*>(all.k) + b * all.k_batch + row * all.k_time + channel;
    const Number* v = static_cast<const Number*>(all.v) + b * all.v_batch + row * all.v_time + channel;
#pragma unroll Weights::kUnroll
    for (int i = 0; i < kBlock; ++i, k += all.k_time, v += all.v_time) {
      const bool inside = block * kBlock + i < rows;
      keys[i] = inside ? static_cast<float>(*k) : -INFINITY;
      values[i] = inside ? static_cast<float>(*v) : 0.0f;
    }
  }
  BIWKV_DEVICE float grad(int row) const {
    const Number* from = static_cast<const Number*>(all.grad_y) + b * all.grad_y_batch + channel;
    return row < rows ? static_cast<float>(from[(first + row) * all.grad_y_time]) : 0.0f;
  }
  // The place of a row in y, grad_k and grad_v.
  BIWKV_DEVICE int64_t place(int row) const { return (b * all.length + first + row) * all.channels + channel; }
  static BIWKV_DEVICE void write(void* to, int64_t at, Real x) {
    static_cast<Number*>(to)[at] = static_cast<Number>(static_cast<float>(x));
  }
};

}  // namespace biwkv
