// The CPU side of the Bi-WKV4 interface: types, tasks, threads, and the sums over the batch.
#include <atomic>
#include <new>
#include <vector>

#include "biwkv4_call.h"
#include "biwkv4_running.h"
#include "biwkv4_shifted.h"

#if defined(__SSE__)
#include <xmmintrin.h>
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

// A task of the fast kernels is a group of neighbouring strips over a segment of time: rows of whole cache lines that
// the prefetchers follow. A sequence of one segment goes through all its phases while the cache holds it; of a longer
// one, each phase is its own round of tasks.
template <class Number>
class Shifted {
 public:
  static constexpr int kWidth = Lanes<Floats>::count, kGroup = 4, kSegment = 16;  // a segment is 16 chunks

  Shifted(const BiwkvCall& call, bool backward)
      : call(call),
        backward(backward),
        strips((call.channels + kWidth - 1) / kWidth),
        groups((strips + kGroup - 1) / kGroup),
        chunks(Scan::chunks_of(call.length)),
        segments((chunks + kSegment - 1) / kSegment),
        frames(call.batch * strips),
        links(call.batch * strips * chunks),
        gradient_links(backward ? call.batch * strips * chunks : 0),
        parameters(call, strips, segments, kWidth) {}

  void run() {
    const int64_t tasks = call.batch * groups;
    if (segments == 1) {
      run_tasks(call, tasks, [this](int64_t task) {
        Group group(*this, task);
        group.sum_keys(0);
        group.join_keys();
        if (!backward) return group.write_output(0);
        group.sum_gradients(0);
        group.join_gradients();
        group.write_gradients(0);
      });
    } else {
      const auto each_segment = [&](auto phase) {
        run_tasks(call, tasks * segments, [&](int64_t task) { (Group(*this, task / segments).*phase)(task % segments); });
      };
      const auto each_group = [&](auto phase) {
        run_tasks(call, tasks, [&](int64_t task) { (Group(*this, task).*phase)(); });
      };
      each_segment(&Group::sum_keys);
      each_group(&Group::join_keys);
      if (backward) {
        each_segment(&Group::sum_gradients);
        each_group(&Group::join_gradients);
        each_segment(&Group::write_gradients);
      } else {
        each_segment(&Group::write_output);
      }
    }
    if (full) throw std::bad_alloc();
    if (backward) parameters.template finish<float>();
  }

 private:
  using Scan = ShiftedScan<Number>;

  class Group {
   public:
    Group(Shifted& all, int64_t task) : all(all), b(task / all.groups), first(task % all.groups * kGroup) {
      const BiwkvCall& call = all.call;
      size = static_cast<int>(first + kGroup <= all.strips ? kGroup : all.strips - first);
      for (int i = 0; i < size; ++i) {
        const int64_t channel = (first + i) * kWidth, strip = b * all.strips + first + i;
        const int lanes = lanes_at(call, channel, kWidth);
        const Floats w = load<Floats>(static_cast<const float*>(call.w) + channel, lanes);
        const Floats u = load<Floats>(static_cast<const float*>(call.u) + channel, lanes);
        fits[i] = Scan::within_bound(w, u, call.length);
        scans[i].open(strip_at<Number>(call, b, channel, lanes), w, u, &all.frames[strip],
                      &all.links[strip * all.chunks], all.backward ? &all.gradient_links[strip * all.chunks] : nullptr);
      }
    }

    void sum_keys(int64_t segment) {
      each_chunk(segment, [this](Scan& scan, int64_t c, int) {
        all.backward ? scan.template sum_keys<true>(c) : scan.template sum_keys<false>(c);
      });
    }
    void join_keys() {
      for (int i = 0; i < size; ++i) if (fits[i]) scans[i].join_keys();
    }
    void write_output(int64_t segment) {
      each_chunk(segment, [](Scan& scan, int64_t c, int) { scan.write_output(c); });
      beyond_bound(segment);
    }
    void sum_gradients(int64_t segment) {
      each_chunk(segment, [](Scan& scan, int64_t c, int) { scan.sum_gradients(c); });
    }
    void join_gradients() {
      for (int i = 0; i < size; ++i) if (fits[i]) scans[i].join_gradients();
    }
    void write_gradients(int64_t segment) {
      each_chunk(segment, [&](Scan& scan, int64_t c, int i) {
        scan.write_gradients(c, all.parameters.w_at(b, first + i, segment), all.parameters.u_at(b, first + i, segment));
      });
      beyond_bound(segment);
    }

   private:
    template <class Phase>
    void each_chunk(int64_t segment, const Phase& phase) {
      const int64_t end = segment + 1 < all.segments ? (segment + 1) * kSegment : all.chunks;
      for (int64_t c = segment * kSegment; c < end; ++c) {
        for (int i = 0; i < size; ++i) if (fits[i]) phase(scans[i], c, i);
      }
    }

    // The strips that the fast kernels leave, whole, by the task of the first segment.
    void beyond_bound(int64_t segment) {
      constexpr int half = Lanes<Doubles>::count;
      for (int i = 0; i < size && segment == 0; ++i) {
        for (int64_t at = 0; at < kWidth && !fits[i]; at += half) {
          const int64_t channel = (first + i) * kWidth + at;
          const int lanes = lanes_at(all.call, channel, half);
          if (lanes <= 0) break;
          try {
            run_strip<Doubles, Number, float>(
                all.call, b, channel, lanes, all.backward ? all.parameters.w_at(b, first + i, 0) + at : nullptr,
                all.parameters.u_at(b, first + i, 0) + at);
          } catch (const std::bad_alloc&) {
            all.full = true;
          }
        }
      }
    }

    Shifted& all;
    int64_t b, first;
    int size;
    bool fits[kGroup];
    Scan scans[kGroup];
  };

  const BiwkvCall& call;
  bool backward;
  int64_t strips, groups, chunks, segments;
  std::vector<Frame> frames;
  std::vector<Chunk> links;
  std::vector<GradientChunk> gradient_links;
  ParameterGradients parameters;
  std::atomic<bool> full{false};
};

int dispatch(const BiwkvCall* call, bool backward) {
  try {
    switch (call->type) {
      case BIWKV_FLOAT64: running<Doubles, double, double>(*call, backward); return BIWKV_OK;
      case BIWKV_FLOAT32: Shifted<float>(*call, backward).run(); return BIWKV_OK;
      case BIWKV_BFLOAT16: Shifted<Bfloat16>(*call, backward).run(); return BIWKV_OK;
      case BIWKV_FLOAT16: Shifted<Float16>(*call, backward).run(); return BIWKV_OK;
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
