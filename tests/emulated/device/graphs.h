// CUDA graphs on the emulated device. While a thread captures, what it launches is written down and not run: results
// have no values, and no memory changes. A replay runs it on the stream that launches it, at the same addresses.
#pragma once

#include <ATen/CPUGeneratorImpl.h>

#include <functional>
#include <memory>

#include "memory.h"

namespace emulated {

using Launch = std::function<void()>;

struct Before {  // bytes as they were before a launch that is only written down
  void* address;
  std::vector<char> bytes;
};

struct Recording {
  int64_t pool;
  std::vector<Launch> launches;
  std::vector<Before> before;
  at::Tensor random_state;
};

inline std::unordered_map<int64_t, std::unique_ptr<Recording>> recordings;
inline std::mutex recordings_mutex;
inline int64_t num_recordings = 0;
// While a recording is replayed, what is launched is run.
inline thread_local Recording* recording = nullptr;

inline bool is_capturing() {
  return recording != nullptr;
}

// What makes the host wait is an error while it captures, and the recording is lost.
inline void refuse_in_capture(const std::string& what) {
  TORCH_CHECK(!is_capturing(), "CUDA error: operation not permitted when stream is capturing (", what, ")");
}

inline at::Generator random_source() {
  return at::detail::getDefaultCPUGenerator();
}

// Keeps what a launch is about to overwrite, unless it has no values anyway.
inline void keep_before(const Access& access) {
  if (!is_capturing() || !access.writes || access.num_bytes == 0) {
    return;
  }
  auto* begin = reinterpret_cast<char*>(access.address);
  recording->before.push_back({begin, std::vector<char>(begin, begin + access.num_bytes)});
}

inline void begin_capture(int64_t pool) {
  refuse_in_capture("capture");
  auto made = std::make_unique<Recording>();
  made->pool = pool;
  made->random_state = random_source().get_state().clone();
  recording = made.get();
  capture_pool = pool;
  captured_blocks.clear();
  std::lock_guard<std::mutex> lock(recordings_mutex);
  recordings[num_recordings++] = std::move(made);
}

// The number of the recording. Memory is as it was, and what was taken meanwhile has no values.
inline int64_t end_capture() {
  TORCH_CHECK(is_capturing(), "CUDA error: no capture is under way");
  for (auto before = recording->before.rbegin(); before != recording->before.rend(); ++before) {
    std::memcpy(before->address, before->bytes.data(), before->bytes.size());
  }
  for (auto [block, num_bytes] : captured_blocks) {
    std::memset(block, 0xfe, num_bytes);
  }
  recording->before.clear();
  random_source().set_state(recording->random_state);
  recording = nullptr;
  capture_pool = 0;
  captured_blocks.clear();
  return num_recordings - 1;
}

inline void replay(int64_t number) {
  refuse_in_capture("replay");
  for (auto& launch : recordings.at(number)->launches) {
    launch();
  }
}

inline void forget(int64_t number) {
  std::lock_guard<std::mutex> lock(recordings_mutex);
  recordings.erase(number);
}

}  // namespace emulated
