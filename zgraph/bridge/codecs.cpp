// Codecs on processors: what zgraph/bridge/codecs.py computes, to the last bit, in one pass over the numbers.
//
// Each function works on whole blocks or chunks from `begin` to `end`, places in a row, so that threads can share a row.
// Compile without contraction and without fast math: a rest is exact only if nothing is rounded twice.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

namespace {

constexpr uint32_t kMagnitude = 0x7fffffff, kInfinity = 0x7f800000;
constexpr int kNotFinite = 255;

uint32_t bits_of(float x) {
  uint32_t found;
  std::memcpy(&found, &x, sizeof found);
  return found;
}

float float_of(uint32_t bits) {
  float found;
  std::memcpy(&found, &bits, sizeof found);
  return found;
}

struct Float32 {
  const float* numbers;
  float operator[](int64_t i) const { return numbers[i]; }
};

struct BFloat16 {
  const uint16_t* numbers;
  float operator[](int64_t i) const { return float_of(uint32_t(numbers[i]) << 16); }
};

// 2 to the power of a byte less 127; 0 of 0, NaN of 255.
float power(int exponent) {
  return exponent == kNotFinite ? std::numeric_limits<float>::quiet_NaN() : float_of(uint32_t(exponent) << 23);
}

// The smallest byte whose power of two is no less than `ratio`, from 1 to 254.
int exponent_of(float ratio) {
  const uint32_t bits = bits_of(std::max(ratio, 0x1p-126f));
  return std::clamp(int((bits + 0x007fffff) >> 23), 1, kNotFinite - 1);
}

// Numbers with what the codes before have left out, and the bits of their largest magnitude.
template <class Numbers>
uint32_t load(Numbers x, const float* rest, int64_t begin, int size, float* y) {
  uint32_t largest = 0;
  if (rest) {
    for (int i = 0; i < size; i++) y[i] = x[begin + i] + rest[begin + i];
  } else {
    for (int i = 0; i < size; i++) y[i] = x[begin + i];
  }
  for (int i = 0; i < size; i++) largest = std::max(largest, bits_of(y[i]) & kMagnitude);
  return largest;
}

template <class Numbers>
void encode_steps(Numbers x, float* rest, uint8_t* scales, uint8_t* payload, int64_t begin, int64_t end, int block,
                  int bits) {
  const float most = bits == 8 ? 127.0f : 7.0f;
  std::vector<float> y(block), steps(block);
  std::vector<int8_t> whole(block);
  for (int64_t at = begin; at < end; at += block) {
    const int size = int(std::min<int64_t>(block, end - at));
    const uint32_t largest = load(x, rest, at, size, y.data());
    const bool is_finite = largest < kInfinity;
    const int exponent = !is_finite ? kNotFinite : largest == 0 ? 0 : exponent_of(float_of(largest) / most);
    scales[at / block] = uint8_t(exponent);
    std::fill(whole.begin(), whole.end(), int8_t(0));
    if (is_finite) {
      const float scale = power(exponent), inverse = scale > 0 ? 1 / scale : 0;
      const float limit = std::min(std::floor(std::numeric_limits<float>::max() * inverse), most);
      for (int i = 0; i < size; i++) steps[i] = std::min(std::max(std::nearbyintf(y[i] * inverse), -limit), limit);
      for (int i = 0; i < size; i++) whole[i] = int8_t(int(steps[i]));
      if (rest) {
        for (int i = 0; i < size; i++) rest[at + i] = y[i] - steps[i] * scale;
      }
    }
    if (bits == 8) {
      std::memcpy(payload + at, whole.data(), size);
    } else {
      uint8_t* out = payload + at / 2;
      const int pairs = (size + 1) / 2;
      for (int i = 0; i < pairs; i++) out[i] = uint8_t((whole[2 * i] & 15) | (whole[2 * i + 1] << 4));
    }
  }
}

void add_steps(const uint8_t* scales, const uint8_t* payload, float* total, int64_t begin, int64_t end, int block,
               int bits) {
  std::vector<int8_t> whole(block + 1);
  for (int64_t at = begin; at < end; at += block) {
    const int size = int(std::min<int64_t>(block, end - at));
    const float scale = power(scales[at / block]);
    const int8_t* steps = reinterpret_cast<const int8_t*>(payload + at);
    if (bits == 4) {
      const uint8_t* pairs = payload + at / 2;
      for (int i = 0; i < (size + 1) / 2; i++) {
        whole[2 * i] = int8_t(int8_t(pairs[i] << 4) >> 4);
        whole[2 * i + 1] = int8_t(int8_t(pairs[i]) >> 4);
      }
      steps = whole.data();
    }
    for (int i = 0; i < size; i++) total[at + i] += float(steps[i]) * scale;
  }
}

// The sum of magnitudes over `count`, by halves: of `width` numbers, a power of two, which are overwritten.
float mean_of(float* magnitudes, int width, float count) {
  for (int i = 0; i < width; i++) magnitudes[i] /= count;
  for (; width > 1; width /= 2) {
    for (int i = 0; i < width / 2; i++) magnitudes[i] += magnitudes[width / 2 + i];
  }
  return magnitudes[0];
}

template <class Numbers>
void encode_signs(Numbers x, float* rest, uint8_t* scales, uint8_t* payload, int64_t begin, int64_t end, int block) {
  int width = 1;
  while (width < block) width *= 2;
  std::vector<float> y(block), magnitudes(width);
  std::vector<uint8_t> is_positive(block);
  for (int64_t at = begin; at < end; at += block) {
    const int size = int(std::min<int64_t>(block, end - at));
    const bool is_finite = load(x, rest, at, size, y.data()) < kInfinity;
    int exponent = kNotFinite;
    if (is_finite) {
      std::fill(magnitudes.begin(), magnitudes.end(), 0.0f);
      for (int i = 0; i < size; i++) magnitudes[i] = std::fabs(y[i]);
      const float mean = mean_of(magnitudes.data(), width, float(size));
      exponent = mean > 0 ? exponent_of(mean / 1.5f) : 0;  // to the nearest power of two, above 1.5 the next
    }
    scales[at / block] = uint8_t(exponent);
    for (int i = 0; i < size; i++) is_positive[i] = y[i] >= 0;
    for (int i = size; i < block; i++) is_positive[i] = 1;
    for (int i = 0; i < (size + 7) / 8; i++) {
      uint64_t eight;
      std::memcpy(&eight, is_positive.data() + 8 * i, 8);
      payload[at / 8 + i] = uint8_t((eight * 0x0102040810204080u) >> 56);  // byte j, 0 or 1, becomes bit j
    }
    if (rest && is_finite) {
      const float scale = power(exponent);
      for (int i = 0; i < size; i++) rest[at + i] = y[i] - (y[i] >= 0 ? scale : -scale);
    }
  }
}

// Plus or minus one for each bit of each byte.
struct Signs {
  float of[256][8];
  Signs() {
    for (int byte = 0; byte < 256; byte++) {
      for (int bit = 0; bit < 8; bit++) of[byte][bit] = byte >> bit & 1 ? 1.0f : -1.0f;
    }
  }
};

const Signs kSigns;

void add_signs(const uint8_t* scales, const uint8_t* payload, float* total, int64_t begin, int64_t end, int block) {
  for (int64_t at = begin; at < end; at += block) {
    const int size = int(std::min<int64_t>(block, end - at));
    const float scale = power(scales[at / block]);
    for (int i = 0; i < size; i += 8) {
      const float* signs = kSigns.of[payload[(at + i) / 8]];
      float* out = total + at + i;
      if (i + 8 <= size) {
        for (int j = 0; j < 8; j++) out[j] += signs[j] * scale;
      } else {
        for (int j = 0; j < size - i; j++) out[j] += signs[j] * scale;
      }
    }
  }
}

// The `count`th largest of magnitudes, as bits, and how many of those that equal it are among the `count` largest. The
// magnitudes are counted by their first 11 bits; only those that share these with it are looked at one by one.
uint32_t threshold(const std::vector<uint32_t>& magnitudes, int size, int count, std::vector<uint32_t>& alike,
                   int* equal) {
  constexpr int kShift = 20;
  static thread_local uint32_t bins[2][1 << (31 - kShift)];  // two, as a number often falls where the last one did
  std::memset(bins, 0, sizeof bins);
  for (int i = 0; i < size; i++) bins[i & 1][magnitudes[i] >> kShift]++;
  int bin = (1 << (31 - kShift)) - 1, wanted = count;
  while (int(bins[0][bin] + bins[1][bin]) < wanted) {
    wanted -= bins[0][bin] + bins[1][bin];
    bin--;
  }
  alike.clear();
  for (int i = 0; i < size; i++) {
    if (int(magnitudes[i] >> kShift) == bin) alike.push_back(magnitudes[i]);
  }
  std::nth_element(alike.begin(), alike.begin() + (wanted - 1), alike.end(), std::greater<uint32_t>());
  const uint32_t found = alike[wanted - 1];
  *equal = wanted - int(std::count_if(alike.begin(), alike.end(), [&](uint32_t m) { return m > found; }));
  return found;
}

template <class Numbers>
void encode_largest(Numbers x, float* rest, uint8_t* places, uint8_t* values, int64_t begin, int64_t end, int chunk,
                    int kept, int kept_of_last) {
  constexpr int kGroup = 16;
  std::vector<float> y(chunk);
  std::vector<uint32_t> magnitudes(chunk), alike;
  for (int64_t at = begin, code = 0; at < end; at += chunk) {
    const int size = int(std::min<int64_t>(chunk, end - at)), count = size == chunk ? kept : kept_of_last;
    const bool is_finite = load(x, rest, at, size, y.data()) < kInfinity;
    for (int i = 0; i < size; i++) magnitudes[i] = bits_of(y[i]) & kMagnitude;
    int equal = 0;
    const uint32_t least = threshold(magnitudes, size, count, alike, &equal);
    const bool keeps = rest && is_finite;
    if (keeps) std::memcpy(rest + at, y.data(), sizeof(float) * size);
    for (int first = 0; first < size; first += kGroup) {
      const int last = std::min(first + kGroup, size);
      uint32_t largest = 0;
      for (int i = first; i < last; i++) largest = std::max(largest, magnitudes[i]);
      if (largest < least) continue;
      for (int i = first; i < last; i++) {
        if (magnitudes[i] < least || (magnitudes[i] == least && equal-- <= 0)) continue;
        const uint32_t cut = magnitudes[i] > kInfinity ? 0x7fc00000 : bits_of(y[i]) & 0xffff0000;
        const uint16_t place = uint16_t(i), value = uint16_t(cut >> 16);
        std::memcpy(places + 2 * code, &place, 2);
        std::memcpy(values + 2 * code, &value, 2);
        if (keeps) rest[at + i] = y[i] - float_of(cut);
        code++;
      }
    }
  }
}

void add_largest(const uint8_t* places, const uint8_t* values, float* total, int64_t begin, int64_t end, int chunk,
                 int kept, int kept_of_last) {
  for (int64_t at = begin, code = 0; at < end; at += chunk) {
    const int size = int(std::min<int64_t>(chunk, end - at)), count = size == chunk ? kept : kept_of_last;
    for (int i = 0; i < count; i++, code++) {
      uint16_t place, value;
      std::memcpy(&place, places + 2 * code, 2);
      std::memcpy(&value, values + 2 * code, 2);
      total[at + std::min<int>(place, size - 1)] += float_of(uint32_t(value) << 16);
    }
  }
}

}  // namespace

// `parts` are scales and payload, or places and values, of what is coded from `begin` on. `is_short`: numbers are
// bfloat16, and else fp32. `rest` may be null.
extern "C" {

void encode_q(const void* x, bool is_short, float* rest, uint8_t* scales, uint8_t* payload, int64_t begin, int64_t end,
              int block, int bits) {
  if (is_short) {
    encode_steps(BFloat16{static_cast<const uint16_t*>(x)}, rest, scales, payload, begin, end, block, bits);
  } else {
    encode_steps(Float32{static_cast<const float*>(x)}, rest, scales, payload, begin, end, block, bits);
  }
}

void decode_q(const uint8_t* scales, const uint8_t* payload, float* total, int64_t begin, int64_t end, int block,
              int bits) {
  add_steps(scales, payload, total, begin, end, block, bits);
}

void encode_sign(const void* x, bool is_short, float* rest, uint8_t* scales, uint8_t* payload, int64_t begin,
                 int64_t end, int block) {
  if (is_short) {
    encode_signs(BFloat16{static_cast<const uint16_t*>(x)}, rest, scales, payload, begin, end, block);
  } else {
    encode_signs(Float32{static_cast<const float*>(x)}, rest, scales, payload, begin, end, block);
  }
}

void decode_sign(const uint8_t* scales, const uint8_t* payload, float* total, int64_t begin, int64_t end, int block) {
  add_signs(scales, payload, total, begin, end, block);
}

void encode_topk(const void* x, bool is_short, float* rest, uint8_t* places, uint8_t* values, int64_t begin,
                 int64_t end, int chunk, int kept, int kept_of_last) {
  if (is_short) {
    encode_largest(BFloat16{static_cast<const uint16_t*>(x)}, rest, places, values, begin, end, chunk, kept,
                   kept_of_last);
  } else {
    encode_largest(Float32{static_cast<const float*>(x)}, rest, places, values, begin, end, chunk, kept, kept_of_last);
  }
}

void decode_topk(const uint8_t* places, const uint8_t* values, float* total, int64_t begin, int64_t end, int chunk,
                 int kept, int kept_of_last) {
  add_largest(places, values, total, begin, end, chunk, kept, kept_of_last);
}

}
