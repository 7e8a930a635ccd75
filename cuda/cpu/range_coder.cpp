// A range coder (rANS, Duda 2013) with a state of 64 bits, words of 32 and frequencies of 16. Its bytes are those of
// CompressAI's coder. modules/bitstream/range_coder.py has the same fields in the same order.
//
// The caller has checked that the tables are as described below. All else is checked here: no index, symbol or stream
// makes the coder read or write outside of the caller's memory.

#include <cstdint>
#include <cstring>

namespace {

constexpr int kBits = 16;                        // of a frequency
constexpr int kFirstBits = 8;                    // upper bits of a value; they tell where the search for it begins
constexpr uint64_t kLowest = uint64_t{1} << 31;  // between two symbols, the state is at least this, and below 2^63

}  // namespace

enum RangeCoderStatus : int {
  RANGE_CODER_OK = 0,
  RANGE_CODER_BAD_TABLE = 1,
  RANGE_CODER_BAD_SYMBOL = 2,
  RANGE_CODER_END = 3
};

struct RangeCoderTables {
  int64_t count;          // n
  const int64_t* starts;  // (n + 1,) where each table starts in `cdfs`, and where the last one ends
  const int32_t* cdfs;    // the tables one after another; each has two or more entries, which increase from 0 to 2^16
  const int32_t* lowest;  // (n,) the symbol of each table's first interval
  const uint16_t* first;  // (n, 256) the interval of each value whose lower 8 bits are 0
};

struct RangeCoderStream {
  uint64_t state;
  const uint8_t *next, *end;  // of the words that have not entered the state
};

extern "C" {

// Codes `count` symbols, each with its table. The stream ends at `end`, which is count + 2 words after the start of the
// caller's memory. Sets `written` to the stream's number of words.
int range_coder_encode(const RangeCoderTables* tables, const int32_t* indexes, const int32_t* symbols, int64_t count,
                       uint32_t* end, int64_t* written) {
  uint64_t state = kLowest;
  uint32_t* word = end;
  for (int64_t i = count - 1; i >= 0; --i) {  // A decoder reads what was coded last first.
    const int64_t index = indexes[i];
    if (index < 0 || index >= tables->count) return RANGE_CODER_BAD_TABLE;
    const int64_t intervals = tables->starts[index + 1] - tables->starts[index] - 1;
    const int64_t interval = int64_t{symbols[i]} - tables->lowest[index];
    if (interval < 0 || interval >= intervals) return RANGE_CODER_BAD_SYMBOL;
    const int32_t* bounds = tables->cdfs + tables->starts[index] + interval;
    const uint64_t low = bounds[0], frequency = bounds[1] - bounds[0];
    if (state >= frequency << (63 - kBits)) {  // At most one word a symbol, so the caller's memory is large enough.
      *--word = static_cast<uint32_t>(state);
      state >>= 32;
    }
    state = (state / frequency << kBits) + state % frequency + low;
  }
  word -= 2;
  std::memcpy(word, &state, sizeof state);
  *written = end - word;
  return RANGE_CODER_OK;
}

// Decodes the next `count` symbols, each with its table.
int range_coder_decode(const RangeCoderTables* tables, RangeCoderStream* stream, const int32_t* indexes,
                       int32_t* symbols, int64_t count) {
  uint64_t state = stream->state;
  const uint8_t* next = stream->next;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t index = indexes[i];
    if (index < 0 || index >= tables->count) return RANGE_CODER_BAD_TABLE;
    const int32_t* cdf = tables->cdfs + tables->starts[index];
    const int32_t value = state & ((1 << kBits) - 1);
    int32_t interval = tables->first[(index << kFirstBits) + (value >> (kBits - kFirstBits))];
    while (cdf[interval + 1] <= value) ++interval;  // This ends at the last entry, 2^16.
    symbols[i] = tables->lowest[index] + interval;
    state = (cdf[interval + 1] - cdf[interval]) * (state >> kBits) + (value - cdf[interval]);
    if (state < kLowest) {
      if (stream->end - next < 4) return RANGE_CODER_END;
      uint32_t word;
      std::memcpy(&word, next, sizeof word);
      next += sizeof word;
      state = state << 32 | word;
    }
  }
  stream->state = state;
  stream->next = next;
  return RANGE_CODER_OK;
}

}  // extern "C"
