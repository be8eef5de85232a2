// A device called "second" that computes on the processor, but refuses operations on tensors of both: on machines without a GPU it finds
// what would fail there for want of a `.to(device)`. An index may be on the processor, as with CUDA. In the rest it is as poor as Apple's GPUs:
// it has no float64, no sparse tensors and no operation that `refuse` was told of, and its fused AdamW never looks at `grad_scale`.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/NativeFunctions.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/extension.h>
#include <set>
#include <string>

namespace {
constexpr auto kind = c10::DeviceType::PrivateUse1;
const c10::Device device(kind, 0);
const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);

struct Memory final : c10::Allocator {
  static void release(void* p) { c10::free_cpu(p); }
  c10::DataPtr allocate(size_t n) override { void* p = c10::alloc_cpu(n); return {p, p, &release, device}; }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t n) const override { default_copy_data(to, from, n); }
} memory;

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
};

struct Guard final : c10::impl::NoOpDeviceGuardImpl<kind> {
  c10::Device getDevice() const override { return device; }
  c10::Device exchangeDevice(c10::Device) const override { return device; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, device); }
};

using at::Tensor;
using Ints = at::IntArrayRef;
using Type = std::optional<at::ScalarType>;

Tensor here(const Tensor& t) {
  return t.is_cpu() ? t : at::from_blob(t.data_ptr(), t.sizes(), t.strides(), at::TensorOptions().dtype(t.dtype()));
}
c10::ScalarType known(Type type) {
  TORCH_CHECK(type != at::kDouble, "this device has no float64");
  return c10::dtype_or_default(type);
}
Tensor empty(Ints size, Type type, std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, keys, known(type), format);
}
Tensor empty_strided(Ints size, Ints stride, Type type, std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, keys, known(type));
}
Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  c10::impl::ExcludeDispatchKeyGuard no_graph(c10::autograd_dispatch_keyset);
  here(to).copy_(here(from));
  return to;
}
Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) { to.resize_(from.sizes()); return copy_from(from, to, false); }
at::Scalar number(const Tensor& t) { return here(t).item(); }
const Tensor& resize(const Tensor& t, Ints size, std::optional<at::MemoryFormat>) {
  at::native::resize_impl_cpu_(t.unsafeGetTensorImpl(), size, std::nullopt);
  return t;
}
Tensor& set_storage(Tensor& t, at::Storage storage, int64_t offset, Ints size, Ints stride) {
  t.unsafeGetTensorImpl()->set_storage_keep_dtype(storage);
  t.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return t;
}
Tensor as_strided(const Tensor& t, Ints size, Ints stride, std::optional<int64_t> offset) { return at::native::as_strided_tensorimpl(t, size, stride, offset); }
Tensor view(const Tensor& t, Ints size) { return at::native::view(t, size); }

std::set<std::string> refused, reached;

void all_others(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const std::string name = op.schema().name(), overload = op.schema().overload_name();
  const std::string full = overload.empty() ? name : name + "." + overload;
  TORCH_CHECK(!refused.count(full), "the operator ", full, " is not implemented on this device");
  reached.insert(full);
  const auto& wanted = op.schema().arguments();
  if (name=="aten::_fused_adamw_")
    for (size_t i = 0; i < wanted.size(); i++)
      if (wanted[i].name()=="grad_scale" || wanted[i].name()=="found_inf") torch::jit::peek(*stack, i, wanted.size()) = c10::IValue();
  bool on_second = false, on_cpu = false;
  auto look = [&](const Tensor& t) { if (t.defined()) (t.is_cpu() ? on_cpu : on_second) |= !t.is_cpu() || t.dim()>0; };
  for (auto& v : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (v.isTensor()) look(v.toTensor());
    else if (v.isTensorList()) for (const Tensor& t : v.toTensorVector()) look(t);
  }
  const bool indexing = name=="aten::index" || name.rfind("aten::index_put", 0)==0 || name.rfind("aten::_index_put", 0)==0;
  TORCH_CHECK(!(on_second && on_cpu) || indexing, "tensors of two devices in ", name);
  at::native::cpu_fallback(op, stack);
}
}

REGISTER_ALLOCATOR(kind, &memory);
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&all_others>()); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", number);
  m.impl("resize_", resize);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
}
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  m.def("refuse", [](const std::set<std::string>& names) { refused = names; });
  m.def("reached", [] { return reached; });
}
