// The CPU side of the Bi-WKV4 interface: types, tasks, threads, and the sums over the batch.
#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "biwkv4_call.h"
#include "biwkv4_running.h"
#include "biwkv4_shifted_backward.h"
#include "biwkv4_shifted_forward.h"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace biwkv {
namespace {

// Denormals are slow on some CPUs and never matter here; the thread's own mode comes back at the end.
class FlushDenormals {
#if defined(__SSE__)
 public:
  FlushDenormals() : mode(_mm_getcsr()) { _mm_setcsr(mode | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(mode); }

 private:
  unsigned mode;
#endif
};

// Stores past the caches keep no order of their own; other threads wait for this.
void finish_past_cache() {
#if defined(__SSE__)
  _mm_sfence();
#endif
}

// Runs task(i) for each i in [0, tasks) on PyTorch's threads. Tasks are cut by sizes alone, never by the number of
// threads, so that results do not depend on it.
template <class Task>
void run_tasks(const BiwkvCall& call, int64_t tasks, const Task& task) {
  const BiwkvRange range = [](int64_t begin, int64_t end, void* context) {
    FlushDenormals mode;
    for (int64_t i = begin; i < end; ++i) (*static_cast<const Task*>(context))(i);
  };
  void* context = const_cast<Task*>(&task);
  const auto parallel_for = reinterpret_cast<BiwkvParallelFor>(call.runner);
  if (parallel_for) {
    parallel_for(0, tasks, 1, range, context);
  } else {
    range(0, tasks, context);
  }
}

// grad_w and grad_u of each strip and segment of time, summed in a fixed order.
class ParameterGradients {
 public:
  ParameterGradients(const BiwkvCall& call, int64_t strips, int64_t segments, int width)
      : call(call), strips(strips), segments(segments), width(width), sums(2 * call.batch * strips * segments * width) {}

  double* w_at(int64_t b, int64_t strip, int64_t segment) {
    return &sums[((b * strips + strip) * segments + segment) * 2 * width];
  }
  double* u_at(int64_t b, int64_t strip, int64_t segment) { return w_at(b, strip, segment) + width; }

  template <class Parameter>
  void finish() {
    for (int64_t c = 0; c < call.channels; ++c) {
      double w = 0, u = 0;
      for (int64_t b = 0; b < call.batch; ++b) {
        for (int64_t segment = 0; segment < segments; ++segment) {
          w += w_at(b, c / width, segment)[c % width], u += u_at(b, c / width, segment)[c % width];
        }
      }
      static_cast<Parameter*>(call.grad_w)[c] = static_cast<Parameter>(w);
      static_cast<Parameter*>(call.grad_u)[c] = static_cast<Parameter>(u);
    }
  }

 private:
  const BiwkvCall& call;
  int64_t strips, segments;
  int width;
  std::vector<double> sums;
};

int lanes_at(const BiwkvCall& call, int64_t channel, int width) {
  return static_cast<int>(channel + width <= call.channels ? width : call.channels - channel);
}

// Channels [channel, channel + lanes) of sequence b with a running maximum; w_at and u_at are null in the forward pass.
template <class V, class Number, class Parameter>
void run_strip(const BiwkvCall& call, int64_t b, int64_t channel, int lanes, double* w_at, double* u_at) {
  using Scan = RunningScan<V, Number>;
  std::vector<typename Scan::State> states(Scan::states_of(call.length, w_at != nullptr));
  const V w = load<V>(static_cast<const Parameter*>(call.w) + channel, lanes);
  const V u = load<V>(static_cast<const Parameter*>(call.u) + channel, lanes);
  Scan scan(strip_at<Number>(call, b, channel, lanes), w, u, states.data());
  if (!w_at) return scan.forward();
  V grad_w, grad_u;
  scan.backward(grad_w, grad_u);
  store(grad_w, w_at, lanes);
  store(grad_u, u_at, lanes);
}

template <class V, class Number, class Parameter>
void running(const BiwkvCall& call, bool backward) {
  constexpr int width = Lanes<V>::count;
  const int64_t strips = (call.channels + width - 1) / width;
  ParameterGradients gradients(call, strips, 1, width);
  std::atomic<bool> full{false};
  run_tasks(call, call.batch * strips, [&](int64_t task) {
    const int64_t b = task / strips, strip = task % strips;
    try {
      run_strip<V, Number, Parameter>(call, b, strip * width, lanes_at(call, strip * width, width),
                                      backward ? gradients.w_at(b, strip, 0) : nullptr, gradients.u_at(b, strip, 0));
    } catch (const std::bad_alloc&) {
      full = true;
    }
  });
  if (full) throw std::bad_alloc();
  if (backward) gradients.finish<Parameter>();
}

// Memory without a value: aligned, uninitialised, grown and never shrunk.
class Buffer {
 public:
  void* at_least(size_t bytes) {
    if (bytes > size) {
      memory.reset();
      memory.reset(::operator new(bytes, std::align_val_t{kVectorBytes}));
      size = bytes;
    }
    return memory.get();
  }

 private:
  struct Free {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t{kVectorBytes}); }
  };
  std::unique_ptr<void, Free> memory;
  size_t size = 0;
};

// The channels beyond the last full strip, copied to and from strips of their own, so that the fast kernels see whole
// vectors only.
template <class Number>
class Tail {
 public:
  static constexpr int kWidth = Lanes<Wide>::count;

  Tail(const BiwkvCall& call, bool backward) : call(call), lanes(call.channels % kWidth) {
    if (!lanes) return;
    of_one = call.length * kWidth;
    tensors = backward ? 5 : 3;
    memory = static_cast<Number*>(buffer.at_least(tensors * call.batch * of_one * sizeof(Number)));
  }

  // Sends the strip's pointers to its copies.
  void redirect(Strip<Number>& s, int64_t b) {
    Number* at = memory + b * tensors * of_one;
    s.k_time = s.v_time = s.grad_y_time = s.out_time = kWidth, s.past_cache = false;
    s.k = at, s.v = at + of_one;
    (tensors == 5 ? s.grad_k : s.y) = at + 2 * of_one;
    if (tensors == 5) s.grad_v = at + 3 * of_one, s.grad_y = at + 4 * of_one;
  }

  void copy_in() {
    each_sequence([this](Strip<Number> from, Strip<Number> to) {
      copy(from.k, from.k_time, const_cast<Number*>(to.k), kWidth);
      copy(from.v, from.v_time, const_cast<Number*>(to.v), kWidth);
      if (call.grad_y) copy(from.grad_y, from.grad_y_time, const_cast<Number*>(to.grad_y), kWidth);
    });
  }

  void copy_out() {
    each_sequence([this](Strip<Number> to, Strip<Number> from) {
      if (call.y) copy(from.y, kWidth, to.y, to.out_time);
      if (call.grad_k) copy(from.grad_k, kWidth, to.grad_k, to.out_time);
      if (call.grad_v) copy(from.grad_v, kWidth, to.grad_v, to.out_time);
    });
  }

 private:
  template <class Work>
  void each_sequence(const Work& work) {
    if (!lanes) return;
    run_tasks(call, call.batch, [&](int64_t b) {
      const Strip<Number> own = strip_at<Number>(call, b, call.channels - lanes, lanes);
      Strip<Number> copy = own;
      redirect(copy, b);
      work(own, copy);
    });
  }

  void copy(const Number* from, int64_t from_time, Number* to, int64_t to_time) const {
    const int written = to_time == kWidth ? kWidth : lanes;
    for (int64_t t = 0; t < call.length; ++t, from += from_time, to += to_time) {
      for (int i = 0; i < written; ++i) to[i] = i < lanes ? from[i] : Number{};
    }
  }

  const BiwkvCall& call;
  int lanes, tensors = 0;
  int64_t of_one = 0;
  Buffer buffer;
  Number* memory = nullptr;
};

// The fast kernels. A short sequence is a task a strip, through all its phases while the cache holds it. A long one is
// cut into segments of time, each phase its own round of tasks; a task is then a group of neighbouring strips, whose
// rows are whole runs of cache lines.
template <class Number, bool backward>
class Shifted {
 public:
  static constexpr int kWidth = Lanes<Wide>::count, kGroup = 4, kSegment = 32;  // a segment is 32 chunks
  static constexpr int64_t kKept = backward ? 1024 : 2048;                      // longest sequence that is kept

  explicit Shifted(const BiwkvCall& call)
      : call(call),
        strips((call.channels + kWidth - 1) / kWidth),
        chunks(chunks_of(call.length)),
        segments(call.length <= kKept ? 1 : (chunks + kSegment - 1) / kSegment),
        parameters(call, strips, segments, kWidth),
        tail(call, backward) {
    const int64_t all = call.batch * strips;
    const size_t of_frames = all * sizeof(Frame), of_chunks = all * chunks * sizeof(Chunk);
    const size_t of_gradients = backward ? all * chunks * sizeof(GradientChunk) : 0;
    char* memory = static_cast<char*>(buffer.at_least(of_frames + of_chunks + of_gradients));
    frames = reinterpret_cast<Frame*>(memory);
    links = reinterpret_cast<Chunk*>(memory + of_frames);
    gradient_links = reinterpret_cast<GradientChunk*>(memory + of_frames + of_chunks);
  }

  void run() {
    tail.copy_in();
    segments == 1 ? run_kept() : run_segments();
    tail.copy_out();
    run_beyond_bound();
    if (full) throw std::bad_alloc();
    if (backward) parameters.template finish<float>();
  }

 private:
  using Scan = std::conditional_t<backward, ShiftedBackward<Number>, ShiftedForward<Number>>;

  void run_kept() {
    run_tasks(call, call.batch * strips, [this](int64_t task) {
      const int64_t b = task / strips, strip = task % strips;
      Scan scan;
      if (!open(scan, b, strip)) return;
      try {
        thread_local Buffer kept;
        void* memory = kept.at_least(Scan::kept_bytes(call.length));
        if constexpr (backward) {
          scan.run(memory, parameters.w_at(b, strip, 0), parameters.u_at(b, strip, 0));
        } else {
          scan.run(memory);
        }
      } catch (const std::bad_alloc&) {
        full = true;
      }
    });
  }

  void run_segments() {
    each_chunk([](Scan& scan, int64_t c, double*, double*) { scan.sum_keys(c); });
    each_strip([](Scan& scan) { scan.join_keys(); });
    if constexpr (backward) {
      each_chunk([](Scan& scan, int64_t c, double*, double*) { scan.sum_gradients(c); });
      each_strip([](Scan& scan) { scan.join_gradients(); });
      each_chunk([](Scan& scan, int64_t c, double* to_w, double* to_u) { scan.write_gradients(c, to_w, to_u); });
    } else {
      each_chunk([](Scan& scan, int64_t c, double*, double*) { scan.write_output(c); });
    }
  }

  template <class Phase>
  void each_chunk(const Phase& phase) {
    const int64_t groups = (strips + kGroup - 1) / kGroup;
    run_tasks(call, call.batch * groups * segments, [&](int64_t task) {
      const int64_t segment = task % segments, b = task / segments / groups, first = task / segments % groups * kGroup;
      const int64_t last = std::min(chunks, (segment + 1) * kSegment);
      const int size = static_cast<int>(std::min<int64_t>(kGroup, strips - first));
      Scan scans[kGroup];
      bool fits[kGroup];
      for (int i = 0; i < size; ++i) fits[i] = open(scans[i], b, first + i);
      for (int64_t c = segment * kSegment; c < last; ++c) {
        for (int i = 0; i < size; ++i) {
          if (!fits[i]) continue;
          scans[i].look_ahead((c + 1) * kRows + kRows * i / size, -i * kWidth, size);
          phase(scans[i], c, parameters.w_at(b, first + i, segment), parameters.u_at(b, first + i, segment));
        }
      }
      finish_past_cache();
    });
  }

  template <class Phase>
  void each_strip(const Phase& phase) {
    run_tasks(call, call.batch * strips, [&](int64_t task) {
      Scan scan;
      if (open(scan, task / strips, task % strips)) phase(scan);
    });
  }

  // False where the strip lies beyond the fast kernels' bound.
  bool open(Scan& scan, int64_t b, int64_t strip) {
    const int64_t channel = strip * kWidth, at = b * strips + strip;
    const int lanes = lanes_at(call, channel, kWidth);
    float w[kWidth] = {}, u[kWidth] = {};
    std::copy_n(static_cast<const float*>(call.w) + channel, lanes, w);
    std::copy_n(static_cast<const float*>(call.u) + channel, lanes, u);
    if (!within_bound(w, u, lanes, call.length)) return false;
    Strip<Number> s = strip_at<Number>(call, b, channel, kWidth);
    s.past_cache = segments > 1 && whole_lines();
    if (lanes < kWidth) tail.redirect(s, b);
    scan.open(s, widen_two(w), widen_two(u), &frames[at], &links[at * chunks]);
    if constexpr (backward) scan.attach(&gradient_links[at * chunks]);
    return true;
  }

  bool whole_lines() const {
    const auto misaligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 != 0; };
    return call.channels * sizeof(Number) % 64 == 0 && !misaligned(call.y) && !misaligned(call.grad_k) &&
           !misaligned(call.grad_v);
  }

  // The strips that the fast kernels leave.
  void run_beyond_bound() {
    const float *all_w = static_cast<const float*>(call.w), *all_u = static_cast<const float*>(call.u);
    if (within_bound(all_w, all_u, static_cast<int>(call.channels), call.length)) return;
    constexpr int half = Lanes<Doubles>::count;
    run_tasks(call, call.batch * strips, [this](int64_t task) {
      const int64_t b = task / strips, strip = task % strips;
      const float *w = static_cast<const float*>(call.w) + strip * kWidth;
      const float *u = static_cast<const float*>(call.u) + strip * kWidth;
      if (within_bound(w, u, lanes_at(call, strip * kWidth, kWidth), call.length)) return;
      for (int64_t at = 0; at < kWidth && strip * kWidth + at < call.channels; at += half) {
        const int64_t channel = strip * kWidth + at;
        try {
          run_strip<Doubles, Number, float>(call, b, channel, lanes_at(call, channel, half),
                                            backward ? parameters.w_at(b, strip, 0) + at : nullptr,
                                            backward ? parameters.u_at(b, strip, 0) + at : nullptr);
        } catch (const std::bad_alloc&) {
          full = true;
        }
      }
    });
  }

  const BiwkvCall& call;
  int64_t strips, chunks, segments;
  ParameterGradients parameters;
  Tail<Number> tail;
  Buffer buffer;
  Frame* frames;
  Chunk* links;
  GradientChunk* gradient_links;
  std::atomic<bool> full{false};
};

// Large results come from the system as untouched pages; asking for huge ones saves most of the faults, which may cost
// more than the kernel itself.
void ask_for_huge_pages(void* result, size_t bytes) {
#if defined(__linux__)
  constexpr size_t page = 4096, least = size_t{4} << 20;
  if (!result || bytes < least) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(result) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(result) + bytes) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

template <class Number>
void shifted(const BiwkvCall& call, bool backward) {
  const size_t bytes = call.batch * call.length * call.channels * sizeof(Number);
  for (void* result : {call.y, call.grad_k, call.grad_v}) ask_for_huge_pages(result, bytes);
  backward ? Shifted<Number, true>(call).run() : Shifted<Number, false>(call).run();
}

int dispatch(const BiwkvCall* call, bool backward) {
  try {
    switch (call->type) {
      case BIWKV_FLOAT64: running<Doubles, double, double>(*call, backward); return BIWKV_OK;
      case BIWKV_FLOAT32: shifted<float>(*call, backward); return BIWKV_OK;
      case BIWKV_BFLOAT16: shifted<Bfloat16>(*call, backward); return BIWKV_OK;
      case BIWKV_FLOAT16: shifted<Float16>(*call, backward); return BIWKV_OK;
    }
  } catch (const std::bad_alloc&) {
    return BIWKV_NO_MEMORY;
  }
  return BIWKV_BAD_TYPE;
}

}  // namespace
}  // namespace biwkv

extern "C" {

int biwkv4_forward(const BiwkvCall* call) { return biwkv::dispatch(call, false); }

int biwkv4_backward(const BiwkvCall* call) { return biwkv::dispatch(call, true); }

}
