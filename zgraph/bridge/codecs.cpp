// Codecs on processors: what zgraph/bridge/codecs.py computes, to the last bit, in one pass over the numbers.
//
// Each function works on `size` numbers of a row from the begin of a block or chunk on, so that threads share a row.
// Where a step does more with numbers than to code them, it does so in tiles that stay in a processor's cache: memory
// is read and written once. Compile without contraction and without fast math: a rest is exact only if nothing is
// rounded twice.

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
constexpr int64_t kTile = 4096;  // numbers, or one block where that is longer

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
  using Stored = float;
  const float* numbers;
  float operator[](int64_t i) const { return numbers[i]; }
  Float32 from(int64_t i) const { return {numbers + i}; }
  static float stored(float x) { return x; }
};

struct BFloat16 {
  using Stored = uint16_t;
  const uint16_t* numbers;
  float operator[](int64_t i) const { return float_of(uint32_t(numbers[i]) << 16); }
  BFloat16 from(int64_t i) const { return {numbers + i}; }
  static uint16_t stored(float x) {  // to the nearest, of two the even one
    const uint32_t bits = bits_of(x);
    return (bits & kMagnitude) > kInfinity ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
};

// What numbers have changed.
template <class Numbers>
struct Difference {
  Numbers now, before;
  float operator[](int64_t i) const { return now[i] - before[i]; }
  Difference from(int64_t i) const { return {now.from(i), before.from(i)}; }
};

// Where the two parts of a code are, scales and payload or places and values, and how numbers are coded: in so many
// bits each, by blocks; in 0 bits, of each chunk the largest.
struct Code {
  uint8_t *first, *second;
  int bits, block, kept, kept_of_last;

  // That of the numbers from the `i`th on, the first of a block.
  Code from(int64_t i) const {
    const int64_t blocks = i / block;
    if (bits == 0) return {first + 2 * blocks * kept, second + 2 * blocks * kept, bits, block, kept, kept_of_last};
    return {first + blocks, second + i * bits / 8, bits, block, kept, kept_of_last};
  }

  // That of another row, so many bytes behind.
  Code below(int64_t bytes) const { return {first + bytes, second + bytes, bits, block, kept, kept_of_last}; }

  // Numbers of a tile.
  int64_t tile() const { return std::max<int64_t>(kTile / block, 1) * block; }
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
void encode_steps(Numbers x, float* rest, Code code, int64_t size) {
  const int block = code.block, bits = code.bits;
  const float most = float((1 << (bits - 1)) - 1);
  std::vector<float> y(block), steps(block);
  std::vector<int8_t> whole(block);
  for (int64_t at = 0; at < size; at += block) {
    const int count = int(std::min<int64_t>(block, size - at));
    const uint32_t largest = load(x, rest, at, count, y.data());
    const bool is_finite = largest < kInfinity;
    const int exponent = !is_finite ? kNotFinite : largest == 0 ? 0 : exponent_of(float_of(largest) / most);
    code.first[at / block] = uint8_t(exponent);
    std::fill(whole.begin(), whole.end(), int8_t(0));
    if (is_finite) {
      const float scale = power(exponent), inverse = scale > 0 ? 1 / scale : 0;
      const float limit = std::min(std::floor(std::numeric_limits<float>::max() * inverse), most);
      for (int i = 0; i < count; i++) steps[i] = std::min(std::max(std::nearbyintf(y[i] * inverse), -limit), limit);
      for (int i = 0; i < count; i++) whole[i] = int8_t(int(steps[i]));
      if (rest) {
        for (int i = 0; i < count; i++) rest[at + i] = y[i] - steps[i] * scale;
      }
    }
    uint8_t* out = code.second + at * bits / 8;
    if (bits == 8) {
      std::memcpy(out, whole.data(), count);
    } else if (bits == 4) {
      const int pairs = (count + 1) / 2;
      for (int i = 0; i < pairs; i++) out[i] = uint8_t((whole[2 * i] & 15) | (whole[2 * i + 1] << 4));
    } else {
      const int fours = (count + 3) / 4;
      for (int i = 0; i < fours; i++) {
        const int8_t* four = whole.data() + 4 * i;
        out[i] = uint8_t((four[0] & 3) | (four[1] & 3) << 2 | (four[2] & 3) << 4 | (four[3] & 3) << 6);
      }
    }
  }
}

void add_steps(Code code, float* total, int64_t size) {
  std::vector<int8_t> whole(code.block);
  for (int64_t at = 0; at < size; at += code.block) {
    const int count = int(std::min<int64_t>(code.block, size - at));
    const float scale = power(code.first[at / code.block]);
    const uint8_t* payload = code.second + at * code.bits / 8;
    const int8_t* steps = reinterpret_cast<const int8_t*>(payload);
    if (code.bits == 4) {
      for (int i = 0; i < (count + 1) / 2; i++) {
        whole[2 * i] = int8_t(int8_t(payload[i] << 4) >> 4);
        whole[2 * i + 1] = int8_t(int8_t(payload[i]) >> 4);
      }
      steps = whole.data();
    } else if (code.bits == 2) {
      for (int i = 0; i < (count + 3) / 4; i++) {
        for (int j = 0; j < 4; j++) whole[4 * i + j] = int8_t(int8_t(payload[i] << (6 - 2 * j)) >> 6);
      }
      steps = whole.data();
    }
    for (int i = 0; i < count; i++) total[at + i] += float(steps[i]) * scale;
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
void encode_signs(Numbers x, float* rest, Code code, int64_t size) {
  const int block = code.block;
  int width = 1;
  while (width < block) width *= 2;
  std::vector<float> y(block), magnitudes(width);
  std::vector<uint8_t> is_positive(block);
  for (int64_t at = 0; at < size; at += block) {
    const int count = int(std::min<int64_t>(block, size - at));
    const bool is_finite = load(x, rest, at, count, y.data()) < kInfinity;
    int exponent = kNotFinite;
    if (is_finite) {
      std::fill(magnitudes.begin(), magnitudes.end(), 0.0f);
      for (int i = 0; i < count; i++) magnitudes[i] = std::fabs(y[i]);
      const float mean = mean_of(magnitudes.data(), width, float(count));
      exponent = mean > 0 ? exponent_of(mean / 1.5f) : 0;  // to the nearest power of two, above 1.5 the next
    }
    code.first[at / block] = uint8_t(exponent);
    for (int i = 0; i < count; i++) is_positive[i] = y[i] >= 0;
    for (int i = count; i < block; i++) is_positive[i] = 1;
    for (int i = 0; i < (count + 7) / 8; i++) {
      uint64_t eight;
      std::memcpy(&eight, is_positive.data() + 8 * i, 8);
      code.second[at / 8 + i] = uint8_t((eight * 0x0102040810204080u) >> 56);  // byte j, 0 or 1, becomes bit j
    }
    if (rest && is_finite) {
      const float scale = power(exponent);
      for (int i = 0; i < count; i++) rest[at + i] = y[i] - (y[i] >= 0 ? scale : -scale);
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

void add_signs(Code code, float* total, int64_t size) {
  for (int64_t at = 0; at < size; at += code.block) {
    const int count = int(std::min<int64_t>(code.block, size - at));
    const float scale = power(code.first[at / code.block]);
    for (int i = 0; i < count; i += 8) {
      const float* signs = kSigns.of[code.second[(at + i) / 8]];
      float* out = total + at + i;
      if (i + 8 <= count) {
        for (int j = 0; j < 8; j++) out[j] += signs[j] * scale;
      } else {
        for (int j = 0; j < count - i; j++) out[j] += signs[j] * scale;
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
void encode_largest(Numbers x, float* rest, Code code, int64_t size) {
  constexpr int kGroup = 16;
  const int chunk = code.block;
  std::vector<float> y(chunk);
  std::vector<uint32_t> magnitudes(chunk), alike;
  for (int64_t at = 0, made = 0; at < size; at += chunk) {
    const int count = int(std::min<int64_t>(chunk, size - at)), kept = count == chunk ? code.kept : code.kept_of_last;
    const bool is_finite = load(x, rest, at, count, y.data()) < kInfinity;
    for (int i = 0; i < count; i++) magnitudes[i] = bits_of(y[i]) & kMagnitude;
    int equal = 0;
    const uint32_t least = threshold(magnitudes, count, kept, alike, &equal);
    const bool keeps = rest && is_finite;
    if (keeps) std::memcpy(rest + at, y.data(), sizeof(float) * count);
    for (int first = 0; first < count; first += kGroup) {
      const int last = std::min(first + kGroup, count);
      uint32_t largest = 0;
      for (int i = first; i < last; i++) largest = std::max(largest, magnitudes[i]);
      if (largest < least) continue;
      for (int i = first; i < last; i++) {
        if (magnitudes[i] < least || (magnitudes[i] == least && equal-- <= 0)) continue;
        const uint32_t cut = magnitudes[i] > kInfinity ? 0x7fc00000 : bits_of(y[i]) & 0xffff0000;
        const uint16_t place = uint16_t(i), value = uint16_t(cut >> 16);
        std::memcpy(code.first + 2 * made, &place, 2);
        std::memcpy(code.second + 2 * made, &value, 2);
        if (keeps) rest[at + i] = y[i] - float_of(cut);
        made++;
      }
    }
  }
}

void add_largest(Code code, float* total, int64_t size) {
  for (int64_t at = 0, made = 0; at < size; at += code.block) {
    const int count = int(std::min<int64_t>(code.block, size - at));
    const int kept = count == code.block ? code.kept : code.kept_of_last;
    for (int i = 0; i < kept; i++, made++) {
      uint16_t place, value;
      std::memcpy(&place, code.first + 2 * made, 2);
      std::memcpy(&value, code.second + 2 * made, 2);
      total[at + std::min<int>(place, count - 1)] += float_of(uint32_t(value) << 16);
    }
  }
}

template <class Numbers>
void encode_numbers(Numbers x, float* rest, Code code, int64_t size) {
  if (code.bits == 0) return encode_largest(x, rest, code, size);
  if (code.bits == 1) return encode_signs(x, rest, code, size);
  encode_steps(x, rest, code, size);
}

void add_numbers(Code code, float* total, int64_t size) {
  if (code.bits == 0) return add_largest(code, total, size);
  if (code.bits == 1) return add_signs(code, total, size);
  add_steps(code, total, size);
}

// The sum of squares: in many small sums, which a processor adds side by side.
template <class Numbers>
double squares(Numbers x, int64_t size) {
  constexpr int kWide = 16;
  double sums[kWide] = {};
  int64_t i = 0;
  for (; i + kWide <= size; i += kWide) {
    for (int j = 0; j < kWide; j++) sums[j] += double(x[i + j]) * double(x[i + j]);
  }
  for (; i < size; i++) sums[i % kWide] += double(x[i]) * double(x[i]);
  double sum = 0;
  for (double one : sums) sum += one;
  return sum;
}

template <class Numbers>
void encode_change(Numbers now, Numbers before, typename Numbers::Stored* kept, double* norms, Code code,
                   int64_t size) {
  const int64_t tile = code.tile();
  const Difference<Numbers> change{now, before};
  double of_change = 0, of_numbers = 0;
  for (int64_t at = 0; at < size; at += tile) {
    const int64_t count = std::min(tile, size - at);
    of_change += squares(change.from(at), count);
    of_numbers += squares(now.from(at), count);
    std::memcpy(kept + at, now.numbers + at, count * sizeof *kept);
    encode_numbers(change.from(at), nullptr, code.from(at), count);
  }
  norms[0] = of_change, norms[1] = of_numbers;
}

template <class Numbers>
void add_change(Code code, Numbers before, typename Numbers::Stored* out, int64_t size) {
  const int64_t tile = code.tile();
  std::vector<float> total(tile);
  for (int64_t at = 0; at < size; at += tile) {
    const int64_t count = std::min(tile, size - at);
    for (int64_t i = 0; i < count; i++) total[i] = before[at + i];
    add_numbers(code.from(at), total.data(), count);
    for (int64_t i = 0; i < count; i++) out[at + i] = Numbers::stored(total[i]);
  }
}

}  // namespace

// Codes are given by where their two parts are, of what is coded, and by the fields of `Code`. `is_short`: numbers are
// bfloat16, and else fp32.
extern "C" {

// Numbers, with `rest` added, which becomes what the code leaves out; it may be null.
void encode(uint8_t* first, uint8_t* second, int bits, int block, int kept, int kept_of_last, int64_t size,
            const void* x, bool is_short, float* rest) {
  const Code code{first, second, bits, block, kept, kept_of_last};
  if (is_short) return encode_numbers(BFloat16{static_cast<const uint16_t*>(x)}, rest, code, size);
  encode_numbers(Float32{static_cast<const float*>(x)}, rest, code, size);
}

// What a code stands for, added to `total`.
void add(uint8_t* first, uint8_t* second, int bits, int block, int kept, int kept_of_last, int64_t size,
         float* total) {
  add_numbers({first, second, bits, block, kept, kept_of_last}, total, size);
}

// The sum of what the codes of `rows` rows stand for, over `divisor`. Rows are `row_bytes` apart.
void sum(uint8_t* first, uint8_t* second, int bits, int block, int kept, int kept_of_last, int64_t size, float* out,
         int64_t row_bytes, int rows, float divisor) {
  const Code code{first, second, bits, block, kept, kept_of_last};
  const int64_t tile = code.tile();
  for (int64_t at = 0; at < size; at += tile) {
    const int64_t count = std::min(tile, size - at);
    std::fill(out + at, out + at + count, 0.0f);
    for (int row = 0; row < rows; row++) add_numbers(code.from(at).below(row * row_bytes), out + at, count);
    if (divisor != 1) {
      for (int64_t i = at; i < at + count; i++) out[i] /= divisor;
    }
  }
}

// What numbers have changed. They are written to `kept`, and the sums of squares of the change and of the numbers to
// `norms`.
void encode_difference(uint8_t* first, uint8_t* second, int bits, int block, int kept_of_chunk, int kept_of_last,
                       int64_t size, const void* x, const void* before, bool is_short, void* kept, double* norms) {
  const Code code{first, second, bits, block, kept_of_chunk, kept_of_last};
  if (is_short) {
    encode_change(BFloat16{static_cast<const uint16_t*>(x)}, BFloat16{static_cast<const uint16_t*>(before)},
                  static_cast<uint16_t*>(kept), norms, code, size);
  } else {
    encode_change(Float32{static_cast<const float*>(x)}, Float32{static_cast<const float*>(before)},
                  static_cast<float*>(kept), norms, code, size);
  }
}

// Numbers as they were, with what a code stands for added.
void add_difference(uint8_t* first, uint8_t* second, int bits, int block, int kept, int kept_of_last, int64_t size,
                    const void* before, bool is_short, void* out) {
  const Code code{first, second, bits, block, kept, kept_of_last};
  if (is_short) {
    add_change(code, BFloat16{static_cast<const uint16_t*>(before)}, static_cast<uint16_t*>(out), size);
  } else {
    add_change(code, Float32{static_cast<const float*>(before)}, static_cast<float*>(out), size);
  }
}

}
