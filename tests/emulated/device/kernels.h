// Kernels of the emulated device: the processor's, on the same memory. Each call is written down with what it reads and
// writes, and where a GPU would make its host wait, that is too.
#pragma once

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <algorithm>
#include <set>

#include "graphs.h"

namespace emulated {

// Kernels whose result has a size, or goes to the host, so that a GPU's host waits for it.
inline const std::set<std::string> WAITING = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::bincount",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
};

// How deep this thread is in kernels of the device: what the processor's call there is no work of the host.
inline thread_local int depth = 0;

struct InKernel {
  InKernel() {
    depth++;
  }
  ~InKernel() {
    depth--;
  }
};

// The bytes from a tensor's first element to its last.
inline Access extent(const at::Tensor& tensor, bool writes) {
  if (!tensor.defined() || tensor.numel() == 0) {
    return {0, 0, writes};
  }
  uint64_t numel = 1;
  for (int64_t d = 0; d < tensor.dim(); d++) {
    numel += (tensor.size(d) - 1) * tensor.stride(d);
  }
  return {reinterpret_cast<uint64_t>(tensor.const_data_ptr()), numel * tensor.element_size(), writes};
}

inline bool is_on_device(const at::Tensor& tensor) {
  return tensor.defined() && tensor.is_cuda();
}

// --- the same tensors, on the processor and back ---------------------------------------------------------------

class Aliases {
 public:
  at::Tensor on_processor(const at::Tensor& tensor) {
    if (!is_on_device(tensor)) {
      return tensor;
    }
    auto* storage = tensor.storage().unsafeGetStorageImpl();
    auto found = aliases_.find(storage);
    if (found == aliases_.end()) {
      auto pointer = c10::DataPtr(storage->mutable_data(), c10::Device(c10::DeviceType::CPU));
      auto alias = c10::Storage(
          c10::Storage::use_byte_size_t(), storage->nbytes(), std::move(pointer), c10::GetAllocator(c10::DeviceType::CPU), true);
      found = aliases_.emplace(storage, alias).first;
      originals_.emplace(alias.unsafeGetStorageImpl(), tensor.storage());
    }
    auto made = made_like(tensor, found->second, c10::DispatchKey::CPU);
    pairs_.emplace_back(tensor, made);
    return made;
  }

  // Storages that a kernel has given more memory get it on the device too.
  void settle() {
    for (auto& [storage, alias] : aliases_) {
      auto num_bytes = alias.nbytes();
      if (alias.data() == storage->data()) {
        continue;
      }
      auto moved = device_allocator.allocate(num_bytes);
      if (num_bytes > 0) {
        std::memcpy(moved.mutable_get(), alias.data(), num_bytes);
      }
      storage->set_data_ptr_noswap(std::move(moved));
      storage->set_nbytes(num_bytes);
    }
  }

  // The device's tensor for one that a kernel of the processor returned. Fresh memory is moved to the device.
  at::Tensor on_device(const at::Tensor& tensor, bool moves) {
    if (!tensor.defined() || tensor.is_cuda()) {
      return tensor;
    }
    for (auto& [original, alias] : pairs_) {
      if (alias.is_same(tensor)) {
        if (original.sizes() != tensor.sizes() || original.strides() != tensor.strides()) {
          original.unsafeGetTensorImpl()->set_sizes_and_strides(
              tensor.sizes(), tensor.strides(), tensor.storage_offset());
        }
        return original;
      }
    }
    auto found = originals_.find(tensor.storage().unsafeGetStorageImpl());
    if (found != originals_.end()) {
      return made_like(tensor, found->second, c10::DispatchKey::CUDA);
    }
    if (!moves) {
      return tensor;
    }
    auto num_bytes = tensor.storage().nbytes();
    auto storage = c10::Storage(
        c10::Storage::use_byte_size_t(), num_bytes, device_allocator.allocate(num_bytes), &device_allocator, true);
    if (num_bytes > 0) {
      std::memcpy(storage.mutable_data(), tensor.storage().data(), num_bytes);
    }
    return made_like(tensor, storage, c10::DispatchKey::CUDA);
  }

 private:
  static at::Tensor made_like(const at::Tensor& tensor, c10::Storage storage, c10::DispatchKey key) {
    auto made =
        at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), tensor.dtype());
    made.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
    return made;
  }

  std::vector<std::pair<at::Tensor, at::Tensor>> pairs_;
  std::unordered_map<c10::StorageImpl*, c10::Storage> aliases_;
  std::unordered_map<c10::StorageImpl*, c10::Storage> originals_;
};

// --- copies between host and device ----------------------------------------------------------------------------

// A copy_ between both. Memory of the host that is not pinned is read before the call returns, and written by then.
inline void note_crossing(const at::Tensor& to, const at::Tensor& from, bool non_blocking) {
  const auto& on_host = to.is_cuda() ? from : to;
  bool pins = is_pinned(on_host.const_data_ptr());
  if (!non_blocking || !pins) {
    refuse_in_capture("copy that blocks");
  }
  std::vector<Access> accesses;
  if (pins || from.is_cuda()) {
    accesses.push_back(extent(from, false));
  }
  if (pins || to.is_cuda()) {
    accesses.push_back(extent(to, true));
  }
  note("op", "aten::copy_", current_stream, 0, accesses);
  if (!non_blocking || (!pins && !to.is_cuda())) {
    note("sync_stream", "copy that blocks", current_stream);
  }
}

// --- any operator ----------------------------------------------------------------------------------------------

inline bool is_view(const c10::FunctionSchema& schema, const std::string& name) {
  if (name == "aten::_reshape_alias" || name == "aten::_unsafe_view") {
    return true;
  }
  for (const auto& result : schema.returns()) {
    if (result.alias_info() != nullptr && !result.alias_info()->isWrite()) {
      return true;
    }
  }
  return false;
}

// Whether it is a list with tensors among others, as TorchScript makes one of a tensor and a None.
inline bool has_tensors(const at::IValue& value) {
  if (!value.isList()) {
    return false;
  }
  auto each = value.toListRef();
  return std::any_of(each.begin(), each.end(), [](const at::IValue& item) { return item.isTensor(); });
}

inline bool writes_to(const c10::Argument& argument) {
  return argument.alias_info() != nullptr && argument.alias_info()->isWrite();
}

// Results that have memory of their own, where a recording has it.
struct Landing {
  size_t result;
  size_t item;
  void* address;
  size_t num_bytes;
};

inline const at::Tensor landed(const at::IValue& value, size_t item) {
  return value.isTensor() ? value.toTensor() : value.toTensorVector().at(item);
}

// Writes a call down, which holds no memory of the device: to be run at the same addresses on the stream that replays it.
inline void record_call(
    const c10::OperatorHandle& op,
    torch::jit::Stack arguments,
    std::vector<Landing> landings,
    std::string name,
    std::vector<Access> accesses) {
  recording->launches.push_back([op, arguments, landings, name, accesses] {
    InKernel here;
    at::AutoDispatchBelowADInplaceOrView guard;
    auto stack = arguments;
    op.callBoxed(&stack);
    for (const auto& landing : landings) {
      auto made = landed(stack.at(landing.result), landing.item);
      std::memcpy(landing.address, made.storage().data(), std::min(landing.num_bytes, made.storage().nbytes()));
    }
    note("op", name, current_stream, 0, accesses);
  });
}

// Runs an operator of the device with the kernel of the processor.
inline void run(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  InKernel here;
  Aliases aliases;
  std::vector<Access> accesses;
  const auto& schema = op.schema();
  const auto& name = schema.operator_name().name;
  bool only_views = is_view(schema, name);
  bool to_device = true;
  bool host_waits = WAITING.count(name) > 0;
  if (host_waits) {
    refuse_in_capture(name);
  }

  auto take = [&](const at::Tensor& tensor, bool writes) {
    if (is_on_device(tensor) && !only_views) {  // numbers of the host go along with the launch
      accesses.push_back(extent(tensor, writes));
      keep_before(accesses.back());
    }
    if (is_capturing() && tensor.defined() && !is_on_device(tensor)) {
      return tensor.clone();
    }
    return aliases.on_processor(tensor);
  };

  auto first = stack->size() - schema.arguments().size();
  if (name == "aten::copy_") {
    auto to = (*stack)[first].toTensor();
    auto from = (*stack)[first + 1].toTensor();
    if (to.is_cuda() != from.is_cuda() && to.numel() > 0) {
      note_crossing(to, from, (*stack)[first + 2].toBool());
      only_views = true;  // it is written down
    }
  }
  for (size_t i = 0; i < schema.arguments().size(); i++) {
    auto& value = (*stack)[first + i];
    bool writes = writes_to(schema.arguments()[i]);
    if (value.isTensor()) {
      value = take(value.toTensor(), writes);
    } else if (value.isTensorList()) {
      auto tensors = value.toTensorVector();
      for (auto& tensor : tensors) {
        tensor = take(tensor, writes);
      }
      value = tensors;
    } else if (value.isOptionalTensorList() || has_tensors(value)) {
      c10::List<std::optional<at::Tensor>> made;
      for (const at::IValue& each : value.toListRef()) {
        if (each.isTensor()) {
          made.push_back(take(each.toTensor(), writes));
        } else {
          made.push_back(std::nullopt);
        }
      }
      value = made;
    } else if (value.isDevice()) {
      to_device = value.toDevice().is_cuda();
      value = c10::Device(c10::DeviceType::CPU);
    }
  }

  torch::jit::Stack arguments;
  if (is_capturing()) {
    arguments.assign(stack->begin() + first, stack->end());
  }
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    op.callBoxed(stack);
  }
  aliases.settle();
  std::vector<Landing> landings;

  auto give = [&](const at::Tensor& tensor, const c10::Argument& result, size_t at, size_t item) {
    auto made = aliases.on_device(tensor, to_device);
    if (is_capturing() && is_on_device(made) && made.storage().data() != tensor.storage().data()) {
      landings.push_back({at, item, made.storage().mutable_data(), made.storage().nbytes()});
    }
    if (is_on_device(made) && !only_views && result.alias_info() == nullptr) {
      accesses.push_back(extent(made, true));
    }
    return made;
  };

  first = stack->size() - schema.returns().size();
  for (size_t i = 0; i < schema.returns().size(); i++) {
    auto& value = (*stack)[first + i];
    if (value.isTensor()) {
      value = give(value.toTensor(), schema.returns()[i], i, 0);
    } else if (value.isTensorList()) {
      auto tensors = value.toTensorVector();
      for (size_t item = 0; item < tensors.size(); item++) {
        tensors[item] = give(tensors[item], schema.returns()[i], i, item);
      }
      value = tensors;
    }
  }
  bool runs = !only_views || name == "aten::copy_";
  if (is_capturing()) {
    if (runs) {
      record_call(op, std::move(arguments), std::move(landings), name, accesses);
    }
  } else if (!only_views) {
    note("op", name, current_stream, 0, accesses);
    if (host_waits) {
      note("sync_stream", name, current_stream);
    }
  }
}

// --- attention -------------------------------------------------------------------------------------------------

// The kernel that a GPU takes: flash attention (1) of few bits without a mask, else the memory-efficient one (2). The
// processor has neither, so that nets which ask for attention can be captured here, but not run.
inline int64_t attention_kernel(
    const at::Tensor& query,
    const at::Tensor&,
    const at::Tensor&,
    const std::optional<at::Tensor>& mask,
    double,
    bool,
    std::optional<double>,
    bool) {
  bool has_mask = mask && mask->defined();
  return !has_mask && query.element_size() == 2 ? 1 : 2;
}

// --- memory ----------------------------------------------------------------------------------------------------

inline at::Tensor empty(
    c10::IntArrayRef size,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<c10::Device>,
    std::optional<bool>,
    std::optional<at::MemoryFormat> format) {
  constexpr auto keys = c10::DispatchKeySet(c10::DispatchKey::CUDA);
  return at::detail::empty_generic(size, &device_allocator, keys, c10::dtype_or_default(dtype), format);
}

inline at::Tensor empty_strided(
    c10::IntArrayRef size,
    c10::IntArrayRef stride,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<c10::Device>,
    std::optional<bool>) {
  constexpr auto keys = c10::DispatchKeySet(c10::DispatchKey::CUDA);
  return at::detail::empty_strided_generic(size, stride, &device_allocator, keys, c10::dtype_or_default(dtype));
}

// A tensor over given memory.
inline at::Tensor& set_memory(
    at::Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return self;
}

}  // namespace emulated
