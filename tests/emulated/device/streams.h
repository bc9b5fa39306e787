// Streams and events of the emulated device. All work runs at once, in the order of its launch: what a stream waits
// for is written down alone.
#pragma once

#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "graphs.h"

namespace emulated {

inline std::atomic<int64_t> num_streams{1};
inline std::atomic<int64_t> num_events{1};

struct Event {
  int64_t id;
};

inline int64_t id_of(void* event) {
  return static_cast<Event*>(event)->id;
}

struct Guard final : public c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override {
    return CUDA;
  }

  // --- one device, which is always the current one

  c10::Device exchangeDevice(c10::Device) const override {
    return c10::Device(CUDA, 0);
  }
  c10::Device getDevice() const override {
    return c10::Device(CUDA, 0);
  }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override {
    return 1;
  }

  // --- streams

  static c10::Stream stream(int64_t id) {
    return c10::Stream(c10::Stream::UNSAFE, c10::Device(CUDA, 0), id);
  }
  c10::Stream getStream(c10::Device) const override {
    return stream(current_stream);
  }
  c10::Stream getDefaultStream(c10::Device) const override {
    return stream(0);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override {
    return stream(num_streams++);
  }
  c10::Stream getNewStream(c10::Device, int) const override {
    return stream(num_streams++);
  }
  c10::Stream exchangeStream(c10::Stream next) const override {
    auto before = current_stream;
    current_stream = next.id();
    return stream(before);
  }
  bool queryStream(const c10::Stream&) const override {
    return true;
  }
  void synchronizeStream(const c10::Stream& waited) const override {
    refuse_in_capture("synchronize");
    note("sync_stream", "", waited.id());
  }
  void synchronizeDevice(const c10::DeviceIndex) const override {
    refuse_in_capture("synchronize");
    note("sync_device", "", 0);
  }

  // --- events: recorded anew, one has a new number

  void record(void** event, const c10::Stream& on, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (*event == nullptr) {
      *event = new Event{0};
    }
    static_cast<Event*>(*event)->id = num_events++;
    note("record", "", on.id(), id_of(*event));
  }
  void block(void* event, const c10::Stream& waiting) const override {
    if (event != nullptr) {
      note("block", "", waiting.id(), id_of(event));
    }
  }
  void synchronizeEvent(void* event) const override {
    refuse_in_capture("synchronize");
    if (event != nullptr) {
      note("sync_event", "", 0, id_of(event));
    }
  }
  bool queryEvent(void* event) const override {  // it is over, and the host knows
    refuse_in_capture("query");
    if (event != nullptr) {
      note("query_event", "", 0, id_of(event));
    }
    return true;
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete static_cast<Event*>(event);
  }
  double elapsedTime(void*, void*, const c10::DeviceIndex) const override {
    return 1.0;
  }
};

}  // namespace emulated
