// What ran on the emulated device, in the order of its launch: operators, events, waits, frees, with the bytes touched.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace emulated {

// The host's main thread, in the place of a stream. Threads that a test names have lower numbers.
constexpr int64_t HOST = -1;

struct Access {
  uint64_t address;
  uint64_t num_bytes;
  bool writes;
};

struct Entry {
  std::string kind;
  std::string name;
  int64_t stream;
  int64_t event;
  int64_t host;
  std::string site;
  std::vector<Access> accesses;
};

inline std::mutex log_mutex;
inline std::vector<Entry> entries;
inline std::atomic<bool> is_recording{false};

inline thread_local int64_t current_stream = 0;
inline thread_local int64_t current_host = HOST;
// The place in Python that asks for the waits that follow on this thread.
inline thread_local std::string current_site;

inline void note(
    const std::string& kind,
    const std::string& name,
    int64_t stream,
    int64_t event = 0,
    std::vector<Access> accesses = {}) {
  if (!is_recording) {
    return;
  }
  std::lock_guard<std::mutex> lock(log_mutex);
  entries.push_back({kind, name, stream, event, current_host, current_site, std::move(accesses)});
}

// One line an entry, with tabs between the fields.
inline std::string written() {
  std::lock_guard<std::mutex> lock(log_mutex);
  std::ostringstream out;
  for (const auto& entry : entries) {
    out << entry.kind << '\t' << entry.name << '\t' << entry.stream << '\t' << entry.event << '\t' << entry.host
        << '\t' << entry.site << '\t';
    for (const auto& access : entry.accesses) {
      out << access.address << ',' << access.num_bytes << ',' << access.writes << ' ';
    }
    out << '\n';
  }
  return out.str();
}

}  // namespace emulated
