// Operators that the processor runs on pinned memory of the host, written down with what they read and write: the
// host's threads take part in races as streams do. Other memory of the host is never in use by a stream.
#pragma once

#include <ATen/record_function.h>

#include "kernels.h"

namespace emulated {

inline bool gather_accesses(const c10::IValue& value, bool writes, std::vector<Access>& accesses) {
  auto add = [&](const at::Tensor& tensor) {
    if (!tensor.defined()) {
      return true;
    }
    bool is_plain = tensor.device().is_cpu() && tensor.layout() == at::kStrided && tensor.has_storage() &&
        !tensor.unsafeGetTensorImpl()->is_python_dispatch();
    if (is_plain && is_pinned(tensor.storage().data())) {
      accesses.push_back(extent(tensor, writes));
    }
    return is_plain;
  };
  if (value.isTensor()) {
    return add(value.toTensor());
  }
  if (value.isTensorList()) {
    for (const at::Tensor& tensor : value.toTensorVector()) {
      if (!add(tensor)) {
        return false;
      }
    }
  }
  return true;
}

inline std::unique_ptr<at::ObserverContext> note_host_op(const at::RecordFunction& function) {
  if (!is_recording || depth > 0) {
    return nullptr;
  }
  auto name = function.operator_name();
  if (!name) {
    return nullptr;
  }
  auto op = c10::Dispatcher::singleton().findOp(*name);
  if (!op || is_view(op->schema(), name->name)) {
    return nullptr;
  }
  std::vector<Access> accesses;
  const auto& arguments = op->schema().arguments();
  auto inputs = function.inputs();
  for (size_t i = 0; i < std::min(inputs.size(), arguments.size()); i++) {
    if (!gather_accesses(inputs[i], writes_to(arguments[i]), accesses)) {
      return nullptr;
    }
  }
  if (!accesses.empty()) {
    note("op", "host " + name->name, current_host, 0, accesses);
  }
  return nullptr;
}

inline void watch_host_ops() {
  auto callback = at::RecordFunctionCallback(&note_host_op).needsInputs(true).scopes({at::RecordScope::FUNCTION});
  at::addGlobalCallback(callback);
}

}  // namespace emulated
