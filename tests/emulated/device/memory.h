// Memory of the emulated device: a pool for each stream, as torch's caching allocator has. A freed block goes back to
// the pool of the stream that it was taken on, and the next of its size on that stream gets it at once.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <unordered_map>

#include "log.h"

namespace emulated {

constexpr size_t BLOCK_BYTES = 512;
constexpr auto CUDA = c10::DeviceType::CUDA;

struct Block {
  int64_t stream;
  size_t num_bytes;
  // Of recordings; 0 for none.
  int64_t pool;
};

// While this thread captures: the pool that memory comes from, and what was taken so far.
inline thread_local int64_t capture_pool = 0;
inline thread_local std::vector<std::pair<void*, size_t>> captured_blocks;

struct Memory {
  std::mutex mutex;
  std::unordered_map<void*, Block> alive;
  std::map<std::tuple<int64_t, int64_t, size_t>, std::vector<void*>> free;
  // Allocations that ask for more than `limit_bytes` in all fail; so does the one with the number `fails_at`.
  int64_t limit_bytes = INT64_MAX;
  int64_t fails_at = -1;
  int64_t num_allocations = 0;
  int64_t alive_bytes = 0;
  int64_t peak_bytes = 0;
  int64_t reserved_bytes = 0;
};

inline Memory memory;

inline void give_back(void* block) {
  std::lock_guard<std::mutex> lock(memory.mutex);
  auto found = memory.alive.find(block);
  if (found == memory.alive.end()) {
    return;
  }
  auto [stream, num_bytes, pool] = found->second;
  memory.alive_bytes -= static_cast<int64_t>(num_bytes);
  if (pool == 0) {  // else it goes to a later recording, whose replays write to it then
    note("free", "free", stream, 0, {{reinterpret_cast<uint64_t>(block), num_bytes, true}});
  }
  memory.free[{pool, stream, num_bytes}].push_back(block);
  memory.alive.erase(found);
}

inline void* take(size_t wanted_bytes) {
  auto num_bytes = (wanted_bytes + BLOCK_BYTES - 1) / BLOCK_BYTES * BLOCK_BYTES;
  std::lock_guard<std::mutex> lock(memory.mutex);
  bool is_told_to_fail = memory.num_allocations++ == memory.fails_at;
  bool has_no_room = memory.alive_bytes + static_cast<int64_t>(num_bytes) > memory.limit_bytes;
  TORCH_CHECK_WITH(
      OutOfMemoryError,
      !is_told_to_fail && !has_no_room,
      "CUDA out of memory. Tried to allocate ",
      num_bytes,
      " bytes. The emulated device has ",
      memory.alive_bytes,
      " bytes in use.");
  auto& pool = memory.free[{capture_pool, current_stream, num_bytes}];
  void* block = nullptr;
  if (!pool.empty()) {
    block = pool.back();
    pool.pop_back();
  } else {
    TORCH_CHECK(posix_memalign(&block, BLOCK_BYTES, num_bytes) == 0, "the machine has no memory left");
    memory.reserved_bytes += static_cast<int64_t>(num_bytes);
    std::memset(block, 0xfe, num_bytes);
  }
  memory.alive[block] = {current_stream, num_bytes, capture_pool};
  if (capture_pool != 0) {
    captured_blocks.emplace_back(block, num_bytes);
  }
  memory.alive_bytes += static_cast<int64_t>(num_bytes);
  memory.peak_bytes = std::max(memory.peak_bytes, memory.alive_bytes);
  return block;
}

struct DeviceAllocator final : public c10::Allocator {
  c10::DataPtr allocate(size_t num_bytes) override {
    void* block = num_bytes == 0 ? nullptr : take(num_bytes);
    return {block, block, &give_back, c10::Device(CUDA, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return &give_back;
  }
  void copy_data(void* to, const void* from, std::size_t num_bytes) const override {
    std::memcpy(to, from, num_bytes);
  }
};

inline DeviceAllocator device_allocator;

// --- pinned memory of the host ---------------------------------------------------------------------------------

struct Pinned {
  std::mutex mutex;
  std::map<uint64_t, uint64_t> ends;
};

inline Pinned pinned;

inline void pin(uint64_t address, uint64_t num_bytes) {
  std::lock_guard<std::mutex> lock(pinned.mutex);
  pinned.ends[address] = address + num_bytes;
}

inline bool is_pinned(const void* pointer) {
  auto address = reinterpret_cast<uint64_t>(pointer);
  std::lock_guard<std::mutex> lock(pinned.mutex);
  auto after = pinned.ends.upper_bound(address);
  return after != pinned.ends.begin() && address < std::prev(after)->second;
}

inline void unpin(void* block) {
  std::lock_guard<std::mutex> lock(pinned.mutex);
  pinned.ends.erase(reinterpret_cast<uint64_t>(block));
  std::free(block);
}

struct PinnedAllocator final : public c10::Allocator {
  c10::DataPtr allocate(size_t num_bytes) override {
    void* block = nullptr;
    TORCH_CHECK(posix_memalign(&block, 4096, std::max<size_t>(num_bytes, 1)) == 0, "the machine has no memory left");
    pin(reinterpret_cast<uint64_t>(block), num_bytes);
    return {block, block, &unpin, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return &unpin;
  }
  void copy_data(void* to, const void* from, std::size_t num_bytes) const override {
    std::memcpy(to, from, num_bytes);
  }
};

inline PinnedAllocator pinned_allocator;

}  // namespace emulated
