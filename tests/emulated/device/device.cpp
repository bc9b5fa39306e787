// A device that is called "cuda" and is the processor, for a torch that is built without CUDA. It is loaded before
// torch is imported. Python speaks to it through the functions at the end.
#include <ATen/native/transformers/attention.h>
#include <torch/library.h>

#include "hooks.h"
#include "host_ops.h"
#include "kernels.h"
#include "log.h"
#include "memory.h"
#include "streams.h"

using namespace emulated;

C10_REGISTER_GUARD_IMPL(CUDA, emulated::Guard);
REGISTER_ALLOCATOR(c10::DeviceType::CUDA, &emulated::device_allocator);

namespace at::native {
REGISTER_CUDA_DISPATCH(_fused_sdp_choice_stub, &emulated::attention_kernel);
}  // namespace at::native

TORCH_LIBRARY_IMPL(_, CUDA, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&emulated::run>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("set_.source_Storage_storage_offset", &emulated::set_memory);
  library.impl("empty.memory_format", &emulated::empty);
  library.impl("empty_strided", &emulated::empty_strided);
  library.impl("copy_", torch::CppFunction::makeFromBoxedFunction<&emulated::run>());
}

extern "C" {

// --- the log

void emulated_record(int is_on) {
  is_recording = is_on != 0;
}

void emulated_clear() {
  std::lock_guard<std::mutex> lock(log_mutex);
  entries.clear();
}

const char* emulated_log() {
  static std::string text;
  text = written();
  return text.c_str();
}

void emulated_watch_host_ops() {
  watch_host_ops();
}

// Names the place that asks for the waits of this thread from here on.
void emulated_site(const char* site) {
  current_site = site;
}

// Makes this thread of the host one of its own in the log.
void emulated_host(int64_t host) {
  current_host = host;
}

// The host's thread goes on with a new event, or waits for one.
int64_t emulated_host_record() {
  int64_t event = num_events++;
  note("record", "", current_host, event);
  return event;
}

void emulated_host_wait(int64_t event) {
  note("block", "", current_host, event);
}

// An access by the host (on_host) or on the current stream.
void emulated_touch(const char* name, int on_host, uint64_t address, uint64_t num_bytes, int writes) {
  note("op", name, on_host != 0 ? current_host : current_stream, 0, {{address, num_bytes, writes != 0}});
}

int64_t emulated_stream() {
  return current_stream;
}

void emulated_synchronize() {
  note("sync_device", "", 0);
}

// --- recordings

void emulated_begin_capture(int64_t pool) {
  begin_capture(pool);
}

int64_t emulated_end_capture() {
  return end_capture();
}

void emulated_replay(int64_t number) {
  replay(number);
}

void emulated_forget(int64_t number) {
  forget(number);
}

int emulated_is_capturing() {
  return is_capturing() ? 1 : 0;
}

// Writes down a launch that no operator makes: a function of Python's, given the number.
void emulated_record_launch(void (*launch)(int64_t), int64_t number) {
  recording->launches.push_back([launch, number] { launch(number); });
}

// Keeps what such a launch is about to write to.
void emulated_keep(uint64_t address, uint64_t num_bytes) {
  keep_before({address, num_bytes, true});
}

// --- memory

// What this thread takes from here on is of a pool; 0 for none.
void emulated_pool(int64_t pool) {
  capture_pool = pool;
}

void emulated_pin(uint64_t address, uint64_t num_bytes) {
  pin(address, num_bytes);
}

int64_t emulated_alive_bytes() {
  return memory.alive_bytes;
}

int64_t emulated_peak_bytes() {
  return memory.peak_bytes;
}

int64_t emulated_reserved_bytes() {
  return memory.reserved_bytes;
}

void emulated_reset_peak() {
  memory.peak_bytes = memory.alive_bytes;
}

// Allocations fail above so many bytes; negative: none does.
void emulated_limit(int64_t num_bytes) {
  memory.limit_bytes = num_bytes < 0 ? INT64_MAX : num_bytes;
}

// The allocation after so many others fails, once; negative: none does.
void emulated_fail_after(int64_t num_allocations) {
  memory.fails_at = num_allocations < 0 ? -1 : memory.num_allocations + num_allocations;
}

// `resize_` of a storage of the device, which a torch for processors has none of.
void emulated_resize(void* storage, uint64_t num_bytes) {
  auto* resized = static_cast<c10::StorageImpl*>(storage);
  auto moved = device_allocator.allocate(num_bytes);
  if (auto kept = std::min<uint64_t>(num_bytes, resized->nbytes()); kept > 0) {
    std::memcpy(moved.mutable_get(), resized->data(), kept);
  }
  resized->set_data_ptr_noswap(std::move(moved));
  resized->set_nbytes(num_bytes);
}

}  // extern "C"
